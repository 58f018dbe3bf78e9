"""Stage 1: align a new projector with captions; tower and language model stay as they are.

    python recipes/pretrain_projector.py                       # nano's own images and captions
    python recipes/pretrain_projector.py --language_model lmsys/vicuna-7b-v1.5 \
        --vision_tower open_clip:ViT-L-14-336-quickgelu/openai --train_file captions.json --image_folder images

The folder that it writes is what `finetune_lora.py --projector FOLDER` starts from.
"""

from __future__ import annotations

import sys

from qllava.training.options.begin import pretrain

if __name__ == "__main__":
    sys.exit(pretrain())
