# SPDX-License-Identifier: Apache-2.0
r"""Shows one conversation as the model will see it: a table of tokens, and the mask as a picture.

    python -m experiments.single_pass.inspect --config=configs/single_pass.py:smoke \
        [--data=FILE] [--index=0]

Columns: index, token, role, turn, position, until (first row that no longer sees it), targets (what
the row is trained to predict). Small masks are drawn as text; --png writes a picture of any size,
from block occupancy when the conversation is long. The last line is {"tokens": n, "edges": n,
"samples": n, "pairs": n, "png": path}.
"""

import pathlib

from absl import flags

from experiments import cli
from lm import setup
from lm.errors import UserError
from lm.single_pass import inspection, layouts, pipeline

cli.define_config()
INDEX = flags.DEFINE_integer("index", 0, "which conversation", lower_bound=0)
MODE = flags.DEFINE_string("mode", None, "layout to show (default: the config's)")
PNG = flags.DEFINE_string("png", None, "write the mask's picture here")


def main() -> dict[str, object]:
    config = cli.config()
    resolved = setup.resolve(config)
    source = setup.conversations(config.data, "all")
    if INDEX.value >= len(source):
        raise UserError(f"--index={INDEX.value}: the data has {len(source)} conversations")
    made, report = layouts.layouts_of(
        pipeline.samples_of(resolved, source[INDEX.value]), MODE.value or config.data.mode
    )
    pictures = []
    for number, (layout, samples) in enumerate(zip(made, report.fitted, strict=True)):
        print(inspection.table(layout, samples, resolved.tokenizer))
        if layout.length <= inspection.TEXT_LIMIT:
            print(inspection.picture(layout.until))
        if PNG.value:
            path = pathlib.Path(PNG.value)
            path = path if len(made) == 1 else path.with_stem(f"{path.stem}-{number}")
            inspection.save_picture(layout, path)
            pictures.append(str(path))
    return {
        "tokens": sum(layout.length for layout in made),
        "edges": sum(layout.num_edges for layout in made),
        "samples": report.samples,
        "pairs": sum(layout.pairs for layout in made),
        "png": pictures[0] if len(pictures) == 1 else pictures or None,
    }


if __name__ == "__main__":
    cli.run(main)
