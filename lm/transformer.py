# SPDX-License-Identifier: Apache-2.0
"""The one decoder-only transformer, with attention injected.

The modules own parameters; what a token may attend to, and where keys and values are kept, is the
business of the attention context (`lm.contexts`). A new method is a new context, not a branch here.

Parameters travel as a nested dict of arrays with the layers stacked on a leading axis:

    embed/table [V, D]    final_norm/scale [D]    unembed/table [V, D] (unless tied)
    layers/attention_norm/scale [L, D]          layers/mlp_norm/scale [L, D]
    layers/attention/q/kernel [L, D, N, H]      layers/attention/{k,v}/kernel [L, D, K, H]
    layers/attention/o/kernel [L, N, H, D]
    layers/mlp/{gate,up}/kernel [L, D, F]       layers/mlp/down/kernel [L, F, D]

Decoding reads every weight for a token or a few, and a loop over stacked layers would copy each
layer out of the stack first. So `hidden` also takes what `unstacked` gives: a tuple of L trees.
"""

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm import layers
from lm.config import LoraConfig, ModelConfig
from lm.contexts import Context
from ops import masked_attention

Params = dict[str, Any]
C = TypeVar("C", bound=Context)

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(masked_attention.SAVED),
    ),
}


class Attention(nnx.Module):
    """Projections and rotary positions around the context's attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        lora = functools.partial(_lora_for, config.lora)
        bias = config.qkv_bias
        self.q = layers.Linear((D,), (N, H), rngs=rngs, bias=bias, lora=lora("q"))
        self.k = layers.Linear((D,), (K, H), rngs=rngs, bias=bias, lora=lora("k"))
        self.v = layers.Linear((D,), (K, H), rngs=rngs, bias=bias, lora=lora("v"))
        depth_scale = 1 / math.sqrt(2 * config.num_layers)
        self.o = layers.Linear((N, H), (D,), rngs=rngs, init_scale=depth_scale, lora=lora("o"))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            norm = functools.partial(
                layers.RMSNorm, H, eps=config.norm_eps, plus_one=config.norm_plus_one
            )
            self.q_norm, self.k_norm = norm(), norm()

    def __call__(self, x, rope, context, state, layer):
        q, k, v = self.q(x), self.k(x), self.v(x)  # [B, T, N, H], [B, T, K, H] twice
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = layers.apply_rope(q, rope), layers.apply_rope(k, rope)
        out, state = context.attend(state, layer, q, k, v)
        return self.o(out), state


class Mlp(nnx.Module):
    """Gated MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        lora = functools.partial(_lora_for, config.lora)
        self.gate = layers.Linear((D,), (F,), rngs=rngs, lora=lora("gate"))
        self.up = layers.Linear((D,), (F,), rngs=rngs, lora=lora("up"))
        depth_scale = 1 / math.sqrt(2 * config.num_layers)
        self.down = layers.Linear((F,), (D,), rngs=rngs, init_scale=depth_scale, lora=lora("down"))
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(
            layers.RMSNorm, config.embed_dim, eps=config.norm_eps, plus_one=config.norm_plus_one
        )
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x, rope, context, state, layer):
        with jax.named_scope("attention"):
            out, state = self.attention(self.attention_norm(x), rope, context, state, layer)
            x = context.constrain(x + out)
        with jax.named_scope("mlp"):
            x = context.constrain(x + self.mlp(self.mlp_norm(x)))
        return x, state


class Table(nnx.Module):
    """One vector per token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stddev: float):
        shape = (config.vocab_size, config.embed_dim)
        self.table = nnx.Param(stddev * jax.random.normal(rngs.params(), shape))


class Transformer(nnx.Module):
    """Tokens, explicit positions and a context in; final hidden states and the updated context
    out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.vocab_size < 1:
            raise ValueError("model.vocab_size must be resolved from the tokenizer first")

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Layer(config, rngs=rngs)

        stddev = 1 / math.sqrt(config.embed_dim)
        self.embed = Table(config, rngs=rngs, stddev=stddev)
        self.layers = stacked(rngs)
        self.final_norm = layers.RMSNorm(
            config.embed_dim, eps=config.norm_eps, plus_one=config.norm_plus_one
        )
        if not config.tied_embeddings:
            self.unembed = Table(config, rngs=rngs, stddev=stddev)
        self.config = config

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        context: C,
        remat: str = "none",
        unstacked: tuple[Params, ...] | None = None,  # instead of the parameters of `layers`
    ) -> tuple[jax.Array, C]:
        config = self.config
        with jax.named_scope("embed"):
            x = layers.lookup(self.embed.table[...].astype(config.dtype), tokens)  # [B, T, D]
            if config.scale_embeddings:
                x = x * jnp.sqrt(jnp.asarray(config.embed_dim, x.dtype))
            x = context.constrain(x)
        rope = context.rope(config, positions)
        graphdef, stack = nnx.split(self.layers)

        def body(carry, xs):
            x, state = carry
            layer, params = xs
            return nnx.merge(graphdef, params)(x, rope, context, state, layer), None

        if remat != "none":
            body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
        indices = jnp.arange(config.num_layers, dtype=jnp.int32)
        carry = x, context.state
        if unstacked is None:
            carry, _ = jax.lax.scan(body, carry, (indices, stack))
        else:
            body = jax.jit(body)  # traced and lowered once for all layers
            for xs in zip(indices, unstacked, strict=True):
                carry, _ = body(carry, xs)
        x, state = carry
        return self.final_norm(x), context.with_state(state)


def _lora_for(lora: LoraConfig, name: str) -> LoraConfig | None:
    return lora if name in lora.targets else None


@functools.lru_cache(maxsize=64)
def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and the parameters as ShapeDtypeStructs: no memory is allocated."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(params=key))))


def unstacked(params: Params) -> Params:
    """The same parameters with `layers` as a tuple of one tree a layer, copied out of the stack
    once; layers that are apart already are shared, and those of NumPy are views."""
    stack = params["layers"]
    if isinstance(stack, tuple):
        return params
    host = isinstance(jax.tree.leaves(stack)[0], np.ndarray)
    return {**params, "layers": (_apart if host else jax.jit(_apart))(stack)}


def _apart(stack: Params) -> tuple[Params, ...]:
    leaves, tree = jax.tree.flatten(stack)
    return tuple(tree.unflatten(layer) for layer in zip(*leaves, strict=True))


def hidden(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,  # [B, T] int32
    positions: jax.Array,  # [B, T] int32
    context: C,
    *,
    remat: str = "none",
) -> tuple[jax.Array, C]:
    """Final-norm hidden states [B, T, D] in the compute dtype, and the context with its new
    state."""
    apart = params["layers"] if isinstance(params["layers"], tuple) else None
    if apart is not None:
        params = {**params, "layers": apart[0]}  # of one layer, for its structure
    model = nnx.merge(abstract(config)[0], params)
    return model(tokens, positions, context, remat, apart)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The output matrix [V, D], in its own dtype."""
    return params["embed" if config.tied_embeddings else "unembed"]["table"]


def logits(config: ModelConfig, params: Params, states: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]: for a few rows; losses use
    `linear_log_prob`."""
    table = unembedding(config, params).astype(states.dtype)
    out = jnp.einsum("...d,vd->...v", states, table, preferred_element_type=jnp.float32)
    if config.logit_softcap is not None:
        out = config.logit_softcap * jnp.tanh(out / config.logit_softcap)
    return out


def count_parameters(config: ModelConfig) -> int:
    """How many numbers the model has, adapters included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1]))
