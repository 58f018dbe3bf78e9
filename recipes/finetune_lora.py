"""Finetune a LLaVA: LoRA on a 4-bit language model, and the projector.

    python recipes/finetune_lora.py                            # nano: teaches a small model to see, in minutes
    python recipes/finetune_lora.py --train_file mine.json --image_folder photos
    python recipes/finetune_lora.py --config recipes/llava15_7b_8gb.yaml --train_file mine.json --output_dir runs/mine

Every setting is a flag and a key of the YAML; `--help` lists them. The same command again resumes a run that was
interrupted.
"""

from __future__ import annotations

import sys

from qllava.training.options.begin import finetune

if __name__ == "__main__":
    sys.exit(finetune())
