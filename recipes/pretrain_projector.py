"""Stage 1: train a new projector on captions; tower and language model stay frozen.

    python recipes/pretrain_projector.py                       # nano's own images and captions
    python recipes/pretrain_projector.py --language_model lmsys/vicuna-7b-v1.5 \
        --vision_tower open_clip:ViT-L-14-336-quickgelu/openai --train_file captions.json --image_folder images

`finetune_lora.py --projector FOLDER` starts from the folder that it writes.
"""

from __future__ import annotations

import sys

from qllava.training.options.begin import pretrain

if __name__ == "__main__":
    sys.exit(pretrain())
