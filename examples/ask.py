"""Asks the handbook's questions with stock transformers and peft, as any user of the adapter would.

python examples/ask.py [ADAPTER_DIRECTORY]
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hetrain.public.model.files import resolve

ROWS = (0, 16, 32)


def main() -> None:
    """Prints question, answer and the handbook's answer for three rows of the evaluation set."""
    directory = resolve("smollm2-135m").directory
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if len(sys.argv) > 1:
        model = PeftModel.from_pretrained(model, sys.argv[1])
    lines = (Path(__file__).parent / "handbook_eval.jsonl").read_text(encoding="utf-8").splitlines()
    for number in ROWS:
        row = json.loads(lines[number])
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {row['prompt'].removesuffix('Answer:').strip()}")
        print(f"    model:    {answer.strip().splitlines()[0] if answer.strip() else ''}")
        print(f"    handbook: {row['completion'].strip()}")


if __name__ == "__main__":
    main()
