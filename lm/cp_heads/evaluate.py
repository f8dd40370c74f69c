# SPDX-License-Identifier: Apache-2.0
"""Expected acceptance of trained heads on the user's data, so that rank and length can be chosen
before any decoder runs."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, setup, transformer, tuned
from lm.config import DataConfig, ModelConfig, SamplingConfig, require_choice, require_positive
from lm.cp_heads import attach, checkpoints, offline
from lm.cp_heads.checkpoints import Loaded
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.data import documents
from lm.errors import UserError
from lm.progress import Progress, say
from lm.workdir import Workdir

TEXTS = ("sampled", "corpus")
NAMES = {"identity": "cp", "constant": "hmm", "linear": "hmm_linear"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure, as opposed to what.

    texts: "sampled" continues prompts from the data with the model itself, which is what the
      formulas ask for; "corpus" takes the data as it goes on, which costs no generation and is
      right as far as the model is.
    prompt_tokens: of each text, at most half of it.
    temperatures: rows for each; () takes the config's.
    """

    texts: str = "sampled"
    prompt_tokens: int = 64
    batch_size: int = 16
    temperatures: tuple[float, ...] = ()
    seed: int = 0
    implementation: str | None = None

    def __post_init__(self):
        require_choice("--texts", self.texts, TEXTS)
        require_positive("--prompt_tokens", self.prompt_tokens)
        require_positive("--batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token sequences whose tokens from `starts` on were drawn from the model (or pass as such)."""

    tokens: np.ndarray  # [B, T] int32, padded on the right
    lengths: np.ndarray  # [B] int32
    starts: np.ndarray  # [B] int32

    @property
    def count(self) -> int:
        """Tokens that were drawn."""
        return int((self.lengths - self.starts).sum())


def name_of(config: HeadConfig, predicted: int | None = None) -> str:
    """What a head is called in tables and figures: `cp r4 n8`, `hmm r4 n8`."""
    return f"{NAMES[config.transition]} r{config.rank} n{predicted or config.predicted}"


def run(
    config: CpConfig, paths: Sequence[pathlib.Path], options: Options = Options()
) -> dict[str, Any]:
    """Measures the heads of several checkpoints and appends their rows to each one's eval.jsonl.

    Of a source that any of the runs was trained on, only what was held out is used; of any other,
    everything up to `data.eval_conversations`. Heads on the same trunk are measured on the same
    texts.

    Raises UserError and DataError.
    """
    if jax.process_count() > 1:
        raise UserError("evaluate runs on one process")
    if not paths:
        raise UserError("which checkpoint? give at least one")
    runs = [path for path in paths if not (attach.is_attached(path) or setup.is_hf(path))]
    trained = [Workdir(path).config(CpConfig).data for path in runs]
    split, asked = setup.split_of(trained, config.data)
    config = dataclasses.replace(config, data=asked)
    temperatures = options.temperatures or (config.sampling.temperature,)
    drawn = [dataclasses.replace(config.sampling, temperature=t) for t in temperatures]
    made: dict[Any, Texts] = {}
    rows = []
    for path in paths:
        loaded = checkpoints.load(path, config)
        params = generate.cast(loaded.model, loaded.params)
        data = data_of(loaded, config)
        trunk = tuned.digest(params)
        for sampling in drawn:
            key = (trunk, dataclasses.replace(data, tokenizer="", template=""), sampling)
            if key not in made:
                made[key] = texts_of(loaded.setup, params, data, sampling, options, split)
            found = measure(loaded, params, made[key], sampling, options)
            known = {
                "source": data.source,
                "trained_on": loaded.setup.config.data.source,
                "texts": options.texts,
                "checkpoint": str(path),
                "seed": options.seed,
            }
            rows += [row | known for row in found]
            if not (attach.is_attached(path) or setup.is_hf(path)):
                for row in rows[-len(found) :]:
                    Workdir(path).append("eval.jsonl", row)
    best = max(rows, key=lambda row: row["expected_tokens_per_call"] or 0)
    return {
        "rows": rows,
        "best": best["method"],
        "expected_tokens_per_call": best["expected_tokens_per_call"],
    }


def data_of(loaded: Loaded, config: CpConfig) -> DataConfig:
    """The data to measure on, with the text formats that the model knows."""
    own = loaded.setup.config.data
    formats = ("tokenizer", "template", "think_open", "think_close")
    return dataclasses.replace(config.data, **{name: getattr(own, name) for name in formats})


def texts_of(
    resolved: setup.Setup,
    params: transformer.Params,
    data: DataConfig,
    sampling: SamplingConfig,
    options: Options,
    split: str | None = None,
) -> Texts:
    """Prompts from the data, continued by the model or as the data goes on.

    split: which part of the data; None: `setup.split_of` decides.

    Raises UserError when the data gives no text of at least two tokens.
    """
    if split is None:
        split, data = setup.split_of([resolved.config.data], data)
    whole = documents_of(resolved, data, split)
    prompts = [ids[: min(options.prompt_tokens, len(ids) // 2)] for ids in whole]
    if options.texts == "corpus":
        new = sampling.max_new_tokens
        return _padded(
            [ids[: len(p) + new] for p, ids in zip(prompts, whole, strict=True)], prompts
        )
    out = []
    with Progress("texts", len(prompts)) as progress:
        for first in range(0, len(prompts), options.batch_size):
            batch = prompts[first : first + options.batch_size]
            out += generate.generate(
                resolved.model,
                params,
                batch,
                sampling,
                resolved.tokenizer.stop_ids,
                jax.random.key(options.seed),
                implementation=options.implementation,
                valid_vocab=resolved.valid_vocab,
                indices=range(first, first + len(batch)),
            )
            progress.advance(len(batch))
    continued = [np.append(p, g.tokens) for p, g in zip(prompts, out, strict=True)]
    return _padded(continued, prompts)


def documents_of(resolved: setup.Setup, data: DataConfig, split: str) -> list[np.ndarray]:
    """The tokens of up to `data.eval_conversations` texts. Raises UserError when there is none."""
    source = setup.records(data, split)
    count = min(len(source), data.eval_conversations)
    if count < len(source):
        say(f"{count} of {len(source)} texts are used (data.eval_conversations)")
        source = [source[i * len(source) // count] for i in range(count)]
    found = []
    for record in source:
        found += documents.tokens_of(record, resolved.template, resolved.tokenizer)
    found = [ids for ids in found if len(ids) > 1][:count]
    if not found:
        raise UserError(f"{data.source}: no text of at least two tokens")
    return found


def _padded(texts: Sequence[np.ndarray], prompts: Sequence[np.ndarray]) -> Texts:
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), generate.bucket(int(lengths.max()))), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return Texts(tokens, lengths, np.array([len(p) for p in prompts], np.int32))


def measure(
    loaded: Loaded,
    params: transformer.Params,  # in the compute dtype
    texts: Texts,
    sampling: SamplingConfig,
    options: Options = Options(),
) -> list[dict[str, Any]]:
    """A row for each n up to P: a head of P factors drafts up to P - 1 tokens."""
    steps, exists = _steps(
        loaded.head_config,
        loaded.head,
        loaded.model,
        params,
        texts,
        sampling,
        loaded.setup.valid_vocab,
        options,
    )
    rows = []
    size = sum(leaf.size for leaf in jax.tree.leaves(loaded.head))
    most = loaded.head_config.predicted
    for predicted in range(min(2, most), most + 1):
        rows.append(
            {
                "kind": "acceptance",
                "method": f"{name_of(loaded.head_config, predicted)} {_drawn(sampling)}",
                "rank": loaded.head_config.rank,
                "transition": loaded.head_config.transition,
                "n": predicted,
                "expander": loaded.head_config.expander,
                **summary(steps, exists, texts, predicted),
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "head_parameters": size,
            }
        )
    return rows


def _drawn(sampling: SamplingConfig) -> str:
    return f"t{sampling.temperature:g}" if sampling.temperature else "greedy"


def _steps(
    config: HeadConfig,
    head: HeadParams,
    model: ModelConfig,
    params: transformer.Params,
    texts: Texts,
    sampling: SamplingConfig,
    valid_vocab: int | None,
    options: Options,
) -> tuple[offline.Steps, np.ndarray]:
    """`offline.measure` of all texts, in batches of equal shape, on the host."""
    found = []
    size = min(options.batch_size, len(texts.lengths))
    with Progress(name_of(config), len(texts.lengths)) as progress:
        for first in range(0, len(texts.lengths), size):
            rows = np.arange(first, first + size) % len(texts.lengths)
            out = offline.measure(
                head,
                config,
                model,
                params,
                texts.tokens[rows],
                texts.lengths[rows],
                sampling,
                valid_vocab=valid_vocab,
                implementation=options.implementation,
            )
            found.append(jax.device_get(out))
            progress.advance(min(size, len(texts.lengths) - first))
    count = len(texts.lengths)
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *found)


def summary(
    steps: offline.Steps, exists: np.ndarray, texts: Texts, predicted: int
) -> dict[str, Any]:
    """What a row says about drafting `predicted` - 1 tokens.

    expected_tokens_per_call and acceptance (of each drafted token that is reached) are those of a
    decoder's own cycles; expected_accepted, total_variation (one per factor), and nll (one per
    factor, given the tokens before it; joint_nll is their sum) are averages over all positions.
    covered: share of the tokens that the draft vocabulary holds.
    """
    walked = offline.walk(steps.accept, texts.lengths, texts.starts, predicted)
    size = exists.shape[1]
    drawn = np.arange(size)[None] >= texts.starts[:, None] - 1
    exists = exists[..., :predicted] & drawn[..., None]
    whole = exists.all(-1)
    log_q = steps.log_q[..., :predicted]
    possible = exists & np.isfinite(log_q)
    nll = [_mean(-log_q[..., s], possible[..., s]) for s in range(predicted)]
    joint = _mean(-log_q.sum(-1), whole & possible.all(-1))
    expected = offline.expected_accepted(steps.accept, steps.overlap, whole, predicted)
    return {
        "expected_tokens_per_call": walked.tokens_per_call if walked.calls.sum() else None,
        "stderr": _finite(walked.stderr()),
        "expected_accepted": expected if whole.any() else None,
        "acceptance": [
            float(kept / reached) if reached else None
            for kept, reached in zip(walked.accepted, walked.reached, strict=True)
        ],
        "total_variation": [
            _mean(1 - steps.overlap[..., s], exists[..., s]) for s in range(predicted)
        ],
        "nll": nll,
        "joint_nll": joint,
        "covered": float(possible[..., 0].sum() / max(exists[..., 0].sum(), 1)),
        "tokens": texts.count,
        "sequences": len(texts.lengths),
    }


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
    return float(values[where].mean(dtype=np.float64)) if where.any() else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
