# SPDX-License-Identifier: Apache-2.0
"""What the tests of evaluation and of tuning share: a task, two methods, and a random model that
reads bytes in place of a checkpoint."""

from lm.long_context import judge
from lm.long_context.config import TasksConfig
from lm.long_context.options import Options
from lm.token_select.config import SelectConfig, TokenSelectConfig
from lm.token_select.methods import Methods
from tests.lm.long_context import small

SELECT = SelectConfig(n_init=4, n_local=32, k=28, chunk=32)
CONFIG = TokenSelectConfig(
    tasks=TasksConfig(names=("passkey",), eval_lengths=(400,), eval_samples=3), select=SELECT
)
TABLE = Methods(SELECT)
PAIR = Options(methods=("token_select", "streaming_llm"), batch_size=2)


def opens(monkeypatch):
    """Checkpoints are this model."""

    def opened(config, methods, path, options, workdir=None):
        chat = bool(options.chat)
        return judge.Judge(config, methods, options, small.speaker(), str(path), chat, workdir)

    monkeypatch.setattr(judge, "opened", opened)
