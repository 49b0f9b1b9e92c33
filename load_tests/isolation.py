"""What it costs that experts live apart: `make bench`.

    python load_tests/isolation.py [--preset tiny] [--model FOLDER|embedded|wide] [--groups N] [--json FILE]

In one run and one cluster: tokens per second of the served application against the same model in-process
(`generation.py`), a dispatch over links against the same over Ray Serve handles (`dispatch.py`), and what short
prompts wait for their first token while long ones prefill (`mixed_prompts.py`).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import dispatch
import generation
import mixed_prompts
from report import machine, machine_line, parser, publish
from stand import stand, supervised


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here, preset = machine(("transformers",)), generation.PRESETS[options.preset]
    mixed_preset = mixed_prompts.PRESETS[options.preset]
    generated: list[generation.Result] = []
    with generation.chosen_models(options) as models, stand() as cluster:
        for model in models:
            cluster.serve(model.folder, options.groups)
            generated += generation.measure(preset, model, options.groups, cluster.url)
        dispatched = dispatch.measure(dispatch.PRESETS[options.preset])
        mixed = list(mixed_prompts.measure(mixed_preset, cluster, mixed_prompts.WAYS))
    facts = {
        "machine": here,
        "preset": options.preset,
        "dispatch": [asdict(result) for result in dispatched],
        "generation": [asdict(result) for result in generated],
        **mixed_prompts.facts_of(mixed),
    }
    parts = (
        machine_line(here),
        dispatch.tables(dispatched),
        generation.tables(generated, preset),
        mixed_prompts.tables(mixed, mixed_preset),
    )
    publish(facts, "\n\n".join(parts), options.json)


if __name__ == "__main__":
    command_line = parser("Measure what it costs that experts live apart.", generation.PRESETS)
    generation.add_model_options(command_line)
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
