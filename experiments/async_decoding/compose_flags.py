# SPDX-License-Identifier: Apache-2.0
"""The flags of commands that put the decoder together with other methods."""

from collections.abc import Sequence

from absl import flags

from experiments import cli, compositions
from lm.async_decoding.compositions import CP_HEADS, FORMS, SPEC_KV, TOKEN_SELECT
from lm.errors import UserError

_OWN = {
    SPEC_KV: ("draft", "draft_layers", "draft_tokens"),
    TOKEN_SELECT: ("select_init", "select_local"),
    CP_HEADS: ("heads",),
}
NAMES = ", ".join(FORMS.values())


def define() -> None:
    """All but --compose itself: a command says how many it takes."""
    whole = compositions.Parts()
    flags.DEFINE_string("draft", "", "spec_kv: workdir or Hugging Face directory of a draft")
    flags.DEFINE_integer(
        "draft_layers", 0, "spec_kv: instead of --draft, the model's first layers", lower_bound=0
    )
    flags.DEFINE_integer("draft_tokens", whole.draft_tokens, "spec_kv: that vote", lower_bound=1)
    flags.DEFINE_integer(
        "select_init", whole.select_init, "token_select: first tokens", lower_bound=0
    )
    flags.DEFINE_integer(
        "select_local", whole.select_local, "token_select: last tokens", lower_bound=1
    )
    flags.DEFINE_string("heads", "", "cp_heads: workdir or Hugging Face directory of a head")


def parts(compose: Sequence[str]) -> compositions.Parts:
    """Where compositions get what they need. Raises UserError for what is missing, and for flags of
    compositions that were not asked for."""
    asked = {text.partition(":")[0] for text in compose}
    for name, given in _OWN.items():
        changed = [flag for flag in given if cli.FLAGS[flag].value != cli.FLAGS[flag].default]
        if changed and name not in asked:
            raise UserError(f"--{changed[0]}: only with --compose={FORMS[name]}")
    if SPEC_KV in asked and not (cli.FLAGS.draft or cli.FLAGS.draft_layers):
        raise UserError(f"--compose={FORMS[SPEC_KV]} needs --draft or --draft_layers")
    if CP_HEADS in asked and not cli.FLAGS.heads:
        raise UserError(f"--compose={CP_HEADS} needs --heads")
    # the flags are named as its fields
    known = [flag for names in _OWN.values() for flag in names]
    return compositions.Parts(**{flag: cli.FLAGS[flag].value for flag in known})
