"""Command lines that cannot work, each with its exit status and a part of its message; no heavy library is needed.

As a program, this file runs command lines that it gets as JSON on stdin, in one process. It prints as JSON the result
of each, and which heavy libraries were imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAVY = (
    *("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "numpy", "pyarrow", "gradio", "PIL"),
    *("scipy", "httpx", "tenacity", "markupsafe"),
)

FINETUNE, PRETRAIN, QLLAVA, DEMO = "finetune", "pretrain", "qllava", "demo"
ABLATE, SCIENCEQA, BUILD_NANO = "ablate", "scienceqa", "build_nano"
PROGRAMS = (FINETUNE, PRETRAIN, QLLAVA, DEMO, ABLATE, SCIENCEQA, BUILD_NANO)

PARTS = "--language_model c/d --vision_tower open_clip:a/b"
BOTH = "--train_file {folder}/rows.json --pretrain_file {folder}/rows.json --projector {folder}/adapter"

# Program, arguments, exit status, part of the message. {folder} is the folder that `prepare` fills.
WRONG: tuple[tuple[str, str, int, str], ...] = (
    (FINETUNE, "--per_device_batch_size 4", 2, "did you mean --per_device_train_batch_size?"),
    (FINETUNE, "--lora_rank 8", 2, "did you mean --lora_r?"),
    (FINETUNE, "--lora_r many", 2, "expected a whole number, not 'many'"),
    (FINETUNE, "--template vicuna", 2, "; did you mean vicuna_v1?"),
    (FINETUNE, "--too_long cut", 2, "invalid choice: 'cut'"),
    (FINETUNE, "--learning_rate fast", 2, "expected a number, not 'fast'"),
    (FINETUNE, "--config {folder}/none.yaml", 1, "none.yaml does not exist"),
    (
        FINETUNE,
        "--config {folder}/key.yaml",
        1,
        "{folder}/key.yaml:2: unknown key 'model'; did you mean model_name_or_path?",
    ),
    (FINETUNE, "--config {folder}/type.yaml", 1, "{folder}/type.yaml:1: lora_r: expected a whole number, not 'many'"),
    (
        FINETUNE,
        "--config {folder}/choice.yaml",
        1,
        "{folder}/choice.yaml:1: The setting too_long is 'cut'. It must be one of error, drop, trim",
    ),
    (FINETUNE, "--train_file {folder}/none.json", 1, "none.json does not exist"),
    (FINETUNE, "--train_file https://example.org/a.json", 1, "https://example.org/a.json is a URL"),
    (FINETUNE, "--train_file {folder}/rows.json --eval_file {folder}/no.json", 1, "eval_file: {folder}/no.json"),
    (FINETUNE, "--train_file {folder}/rows.json --image_folder {folder}/no", 1, "image_folder: {folder}/no does not"),
    (FINETUNE, "--train_file {folder}/rows.json --image_folder {folder}/rows.json", 1, "is not a folder"),
    (FINETUNE, "--output_dir {folder}/finished", 1, "contains a finished run"),
    (FINETUNE, "--output_dir {folder}/rows.json", 1, "is a file. Give a folder"),
    (FINETUNE, "--output_dir {folder}/rows.json/run", 1, "cannot be written, because {folder}/rows.json is a file"),
    (FINETUNE, "--model_name_or_path ./no-llava --train_file {folder}/rows.json", 1, "./no-llava does not exist"),
    (FINETUNE, "--model_name_or_path https://huggingface.co/llava-hf/x-7b", 1, "Its hub name is llava-hf/x-7b"),
    (FINETUNE, "--language_model {folder}/empty --train_file {folder}/rows.json", 1, "empty is empty"),
    (FINETUNE, "--projector {folder}/empty", 1, "has no projector.safetensors"),
    (
        FINETUNE,
        "--report_to no_such_tracker",
        1,
        "report_to is 'no_such_tracker'. It must be one of none, all, azure_ml",
    ),
    (FINETUNE, "--optim adamw_anyprecision", 1, "pip install torchdistx"),
    (FINETUNE, "--optim galore_adamw", 1, "only LoRA and the projector are trained"),
    (FINETUNE, "--packing true", 1, "packing has no effect in qllava"),
    (FINETUNE, "--neftune_noise_alpha 5", 1, "neftune_noise_alpha has no effect in qllava"),
    (FINETUNE, "--per_device_train_batch_size 0", 1, "per_device_train_batch_size is 0. Give a number of at least 1"),
    (FINETUNE, "--num_train_epochs 0", 1, "nothing would be trained"),
    (FINETUNE, "--max_steps 0", 1, "nothing would be trained"),
    (FINETUNE, "--max_steps 5 --num_train_epochs 2", 1, "num_train_epochs would be ignored"),
    (FINETUNE, "--lr_scheduler_type cosine_with_min_lr", 1, "needs lr_scheduler_kwargs with min_lr or min_lr_rate"),
    (FINETUNE, "--bf16 true --fp16 true", 1, "bf16 and fp16 are both set"),
    (FINETUNE, "--fit_memory lots", 1, "fit_memory: The memory size 'lots' cannot be read. Write it like 12GB"),
    (FINETUNE, "--model_name_or_path a/b --language_model c/d --train_file {folder}/rows.json", 1, "not both"),
    (FINETUNE, "--model_name_or_path nano --vision_tower open_clip:a/b", 1, "not both"),
    (FINETUNE, "--language_model c/d --train_file {folder}/rows.json", 1, "both language_model and vision_tower"),
    (PRETRAIN, "--vision_tower open_clip:a/b --train_file {folder}/rows.json", 1, "both language_model and vision"),
    (FINETUNE, f"{PARTS} --train_file {{folder}}/rows.json", 1, "needs a trained projector"),
    (FINETUNE, f"{PARTS} {BOTH}", 1, "Remove one of the two"),
    (FINETUNE, f"--model_name_or_path {{folder}}/adapter {BOTH}", 1, "contains a projector"),
    (FINETUNE, "--base_model {folder}/adapter", 1, "base_model is the new location of a run's base"),
    (PRETRAIN, "--pretrain_file {folder}/rows.json", 1, "pretrain_file is a setting of finetune_lora"),
    (PRETRAIN, "--projector {folder}/adapter", 1, "projector is a setting of finetune_lora"),
    (PRETRAIN, "--model_name_or_path {folder}/adapter --train_file {folder}/rows.json", 1, "with finetune_lora"),
    (PRETRAIN, "--train_file {folder}/none.json", 1, "none.json does not exist"),
    (PRETRAIN, "--langauge_model x", 2, "did you mean --language_model?"),
    (PRETRAIN, "--language_model some/llama", 1, "train_file is missing"),
    (QLLAVA, "chekc", 2, "; did you mean check?"),
    (QLLAVA, "eval sciencqa", 2, "; did you mean scienceqa?"),
    (QLLAVA, "check {folder}/none.json", 1, "DATA: {folder}/none.json does not exist"),
    (QLLAVA, "check https://example.org/a.json", 2, "https://example.org/a.json is a URL"),
    (QLLAVA, "check {folder}/rows.json --image-dir x", 2, "did you mean --image-folder?"),
    (QLLAVA, "inspect {folder}/rows.json --model ./none", 1, "./none does not exist"),
    (QLLAVA, "inspect {folder}/rows.json --rows none", 2, "expected a whole number of at least 1, not none"),
    (QLLAVA, "plan --config {folder}/none.yaml", 1, "none.yaml does not exist"),
    (
        QLLAVA,
        "plan --config {folder}/key.yaml",
        1,
        "{folder}/key.yaml:2: unknown key 'model'; did you mean model_name_or_path?",
    ),
    (QLLAVA, "plan --fit lots", 1, "--fit: The memory size 'lots' cannot be read"),
    (QLLAVA, "check --config {folder}/type.yaml", 1, "{folder}/type.yaml:1: lora_r: expected a whole number"),
    (QLLAVA, "merge {folder}/none {folder}/out", 1, "RUN: {folder}/none does not exist"),
    (QLLAVA, "merge {folder}/adapter {folder}/out --base-model ./none", 1, "--base-model: ./none does not exist"),
    (QLLAVA, "export {folder}/none/ {folder}/out --format gguf", 1, "MODEL: {folder}/none/ does not exist"),
    (QLLAVA, "chat nano --image {folder}/none.jpg", 1, "--image: {folder}/none.jpg does not exist"),
    (QLLAVA, "chat {folder}/adapter --compare {folder}/adapter --prompt x", 1, "cannot be used with --prompt"),
    (QLLAVA, "chat nanoo", 1, "MODEL: nanoo does not exist. Did you mean nano?"),
    (QLLAVA, "chat {folder}/adaptr", 1, "MODEL: {folder}/adaptr does not exist. Did you mean {folder}/adapter?"),
    (QLLAVA, "chat runs/finetune_lra", 1, "MODEL: runs/finetune_lra does not exist. Give the folder"),
    (QLLAVA, "export naon {folder}/out --format gguf", 1, "Did you mean nano?"),
    (QLLAVA, "merge {folder}/adaptr {folder}/out", 1, "Did you mean {folder}/adapter?"),
    (QLLAVA, "check {folder}/row.json", 1, "DATA: {folder}/row.json does not exist. Did you mean {folder}/rows.json?"),
    (QLLAVA, "check {folder}/none.json", 1, "none.json does not exist. Check the path."),
    (QLLAVA, "chat {folder}/aligning", 1, "aligning is not finished. Run the training command again"),
    (QLLAVA, "merge {folder}/aligning {folder}/out", 1, "RUN: {folder}/aligning is not finished."),
    (
        QLLAVA,
        "export {folder}/halfway {folder}/out --format gguf",
        1,
        "newest checkpoint, {folder}/halfway/checkpoint-2",
    ),
    (QLLAVA, "eval vqa {folder}/halfway {folder}/rows.json", 1, "MODEL: {folder}/halfway is not finished"),
    (QLLAVA, "check {folder}/rows.json --model {folder}/aligning", 1, "is not finished"),
    (QLLAVA, "merge {folder}/aligned {folder}/out", 1, "aligned is a stage 1 run, which has only a projector"),
    (DEMO, "--model {folder}/halfway", 1, "is not finished"),
    (FINETUNE, "--model_name_or_path {folder}/halfway --train_file {folder}/rows.json", 1, "is not finished"),
    (QLLAVA, "chat nano", 1, "No nano run in runs/ is finished. Run `make finetune` first."),
    (QLLAVA, "export nano {folder}/out --format gguf", 1, "No nano run in runs/ is finished"),
    (QLLAVA, "eval vqa nano {folder}/rows.json", 1, "No nano run in runs/ is finished"),
    (QLLAVA, "synthesize {folder}/none.jsonl {folder}/o.json --teacher rules", 1, "CONTEXTS: {folder}/none.jsonl"),
    (QLLAVA, "filter {folder}/none.json {folder}/o.json", 1, "none.json does not exist"),
    (QLLAVA, "filter {folder}/rows.json {folder}/no/o.json", 1, "the folder {folder}/no does not exist"),
    (QLLAVA, "eval vqa nano {folder}/none.json", 1, "DATA: {folder}/none.json does not exist"),
    (QLLAVA, "eval vqa {folder}/adapter {folder}/rows.json --shots 2", 1, "must be used together"),
    (QLLAVA, "eval scienceqa --problems {folder}/rows.json --model {folder}/adapter", 1, "--model needs --out"),
    (QLLAVA, "eval scienceqa --problems {folder}/p.json --answers {folder}/a.jsonl", 1, "--problems: {folder}/p.json"),
    (QLLAVA, "eval agreement --votes {folder}/v.jsonl --judgments {folder}/j.jsonl", 1, "--votes: {folder}/v.jsonl"),
    (DEMO, "--model ./none", 1, "./none does not exist"),
    (DEMO, "", 1, "No nano run in runs/ is finished"),
    (DEMO, "--prot 7861", 2, "did you mean --port?"),
    (DEMO, "--auth {folder}/none.txt", 1, "none.txt does not exist"),
    (ABLATE, "--config {folder}/none.yaml", 1, "--config: {folder}/none.yaml does not exist"),
    (ABLATE, "--seed 1", 2, "did you mean --seeds?"),
    (
        SCIENCEQA,
        "--problems {folder}/p.json --image_folder {folder} --out {folder}/out",
        1,
        "--problems: {folder}/p.json",
    ),
    (BUILD_NANO, "--out {folder}/rows.json", 1, "is a file. Give a folder"),
)


def prepare(folder: Path) -> None:
    """Write the files and folders that the command lines name."""
    (folder / "rows.json").write_text("[]")
    (folder / "key.yaml").write_text("lora_r: 8\nmodel: x\n")
    (folder / "type.yaml").write_text("lora_r: many\n")
    (folder / "choice.yaml").write_text("too_long: cut\n")
    (folder / "empty").mkdir()
    (folder / "adapter").mkdir()
    for name in ("qllava.json", "adapter_config.json", "projector.safetensors", "config.json"):
        (folder / "adapter" / name).write_text("{}")
    for name in ("halfway/checkpoint-2/adapter_config.json", "halfway/run.yaml", "halfway/data.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for name in (
        "aligning/stage1/checkpoint-2/projector.safetensors",
        "aligning/run.yaml",
        "aligned/projector.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "finished").mkdir()
    (folder / "finished" / "results.json").write_text("{}")
    (folder / "finished" / "run.yaml").write_text("{}")


def run(program: str, words: list[str]) -> dict[str, Any]:
    """Run one command line in this process, and return its status and its output."""
    from qllava import cli
    from qllava.pages import server as app
    from qllava.training.options import begin
    from recipes import ablate, build_nano, scienceqa

    mains = (begin.finetune, begin.pretrain, cli.main, app.main, ablate.main, scienceqa.main, build_nano.main)
    main: Callable[[list[str]], Any] = dict(zip(PROGRAMS, mains, strict=True))[program]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status: Any = main(words)
        except SystemExit as end:
            status = end.code
    return {"status": status, "said": said.getvalue()}


if __name__ == "__main__":
    results = [run(program, words) for program, words in json.load(sys.stdin)]
    print(json.dumps({"results": results, "heavy": [name for name in HEAVY if name in sys.modules]}))
