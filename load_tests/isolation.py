"""What it costs that experts live apart: `make bench`.

    python load_tests/isolation.py [--preset tiny] [--model FOLDER | --wide] [--groups N] [--json FILE]

In one run and one cluster: tokens per second of the served application against the same model in-process
(`generation.py`), and a dispatch over links against the same over Ray Serve handles (`dispatch.py`).
"""

from __future__ import annotations

from dataclasses import asdict

import dispatch
import generation
from report import machine, machine_line, parser, publish
from stand import one_line_errors, served


def main() -> None:
    """The command line."""
    options_parser = parser("Measure what it costs that experts live apart.", generation.PRESETS)
    generation.add_model_options(options_parser)
    options = options_parser.parse_args()
    here, preset = machine(), generation.PRESETS[options.preset]
    with (
        one_line_errors(),
        generation.chosen_model(options) as (model, name),
        served(model, options.groups) as cluster,
    ):
        generated = generation.measure(preset, model, name, options.groups, cluster.url)
        dispatched = dispatch.measure(dispatch.PRESETS[options.preset])
    facts = {
        "machine": here,
        "preset": options.preset,
        "dispatch": [asdict(result) for result in dispatched],
        "generation": [asdict(result) for result in generated],
    }
    parts = (machine_line(here), dispatch.tables(dispatched), generation.tables(generated, preset))
    publish(facts, "\n\n".join(parts), options.json)


if __name__ == "__main__":
    main()
