"""The training of ``make demo`` with stock peft, in clear: ``python -m benchmarks.demo_plain DIRECTORY``.

Rows, initial adapter, micro-batches and schedule are those of `examples/demo.sh`. The adapter goes to the
directory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.corrections import DelayedTraining, Run, held_out_loss, set_up
from benchmarks.plain import plain_model
from hetrain.config import LoraConfig
from hetrain.train.session import open_base

RECIPE = Run("handbook", updates=48, tokens=512, seed=42, learning_rate=4e-3)
LORA = LoraConfig(layers="15-29")
_SHOWN = 5


def main() -> None:
    """Trains, prints losses, writes the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    base = open_base("smollm2-135m")
    setup = set_up(base, RECIPE, RECIPE.tokens, LORA)
    model = plain_model(base.files.directory, LORA, setup.values)
    training = DelayedTraining(model, RECIPE)
    for number, batches in enumerate(setup.updates, 1):
        loss = training.update(batches)
        if number % _SHOWN == 0:
            print(f"update {number} of {RECIPE.updates}: loss {loss:.3f}", flush=True)
    print(f"evaluation loss {held_out_loss(model, setup.held_out):.3f}")
    model.save_pretrained(output)
    base.tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
