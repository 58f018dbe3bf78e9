"""The benchmarks at no size: that they run, that they compare what is equal, and that their figures are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import (
    few_shot,
    filter_million,
    flops,
    gpu,
    machine,
    merge_memory,
    plan_memory,
    rules_vs_naive,
    serving_loss,
    shapes,
    throughput,
)
from benchmarks.counting import counter
from benchmarks.pairing import largest_difference, paired_ratio
from benchmarks.samples import Text, make_texts, within_steps, write_texts
from benchmarks.step import Step
from benchmarks.systems import Job, build, mean_loss
from benchmarks.turns import Failed, Worker
from qllava.data.formats import read_examples
from qllava.data.packing import lay_out
from qllava.image_layout import ImageLayout
from qllava.inference import load
from tests.tiny_models import make_image, make_tiny_llava
from tests.tiny_runs import Tiny

KEYS = {
    "samples_per_image",
    "system",
    "samples_per_second",
    "ratio",
    "ratio_ci95",
    "loss",
    "useful_tokens",
    "tflop_per_sample",
}


# Statistics, by hand


def test_the_ratio_is_the_median_of_the_repetitions_own():
    # The machine was three times slower in the second repetition: a ratio of means would be 20 / 11.
    ratio, (low, high) = paired_ratio([1, 9, 1], [2, 16, 2])
    assert ratio == 2
    assert low == pytest.approx(16 / 9) and high == 2


def test_an_equal_ratio_has_no_spread():
    assert paired_ratio([1, 2, 3, 4], [3, 6, 9, 12]) == (3, (3, 3))


@pytest.mark.parametrize(("seconds", "baseline"), [([], []), ([1], [1, 2])])
def test_what_has_no_partner_is_no_ratio(seconds, baseline):
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio(seconds, baseline)


def test_losses_that_differ_by_more_than_a_hundredth_are_told():
    def lines(*losses):
        return [{"samples_per_image": 1.0, "loss": loss} for loss in losses]

    assert largest_difference([2.0, 2.0, 1.0]) == 0.5
    assert throughput.disagreement(lines(5.00, 5.04, 4.96)) is None
    assert "more than 1 %" in str(throughput.disagreement(lines(5.0, 5.0, 5.06)))
    assert throughput.disagreement(lines(5.0, 5.0, float("nan")))


def test_other_learned_tokens_end_the_comparison():
    def step(learned):
        return Step(1.0, 2, 10, learned, 10, None, 0, 0)

    throughput.check_same([step(3), step(3)], [[step(4)], [step(4)]])
    with pytest.raises(SystemExit, match="same tokens"):
        throughput.check_same([step(3), step(3)], [[step(4)], [step(5)]])


# Samples


def test_a_mixture_has_its_mean_and_lengths_are_those_of_instruct(tmp_path):
    texts = make_texts(tmp_path, side=28, samples_per_image=1.95, samples_per_step=6, steps=60, seed=0)
    mean = sum(text.tokens for text in texts) / len(texts)
    assert 180 < mean < 220
    assert 1.7 < len(texts) / len({text.image for text in texts}) < 2.1
    learned = sum(len(text.answer.split()) for text in texts) / sum(text.tokens for text in texts)
    assert 0.4 < learned < 0.6
    with pytest.raises(ValueError, match="samples per image"):
        make_texts(tmp_path, side=28, samples_per_image=2.5, samples_per_step=6, steps=1, seed=0)


def test_another_order_has_the_same_samples_in_each_step():
    texts = [Text(str(n), "w " * n, "w") for n in (3, 9, 1, 8, 2, 7)]
    for order in ("sorted", "shuffled"):
        moved = within_steps(texts, 3, order, seed=0)
        for start in (0, 3):
            assert sorted(map(str, moved[start : start + 3])) == sorted(map(str, texts[start : start + 3]))
    assert [text.image for text in within_steps(texts, 3, "sorted", seed=0)] == ["9", "3", "1", "8", "7", "2"]


# FLOPs


def equal_texts(folder: Path, *, samples: int, text: int, learned: int) -> str:
    """A file of samples of one length about one image, two steps of them."""
    image = make_texts(folder / "pictures", side=28, samples_per_image=1, samples_per_step=1, steps=1, seed=0)[0]
    made = Text(image.image, "w1 " * (text - learned - 5), "w2 " * (learned - 1))
    assert made.tokens == text
    write_texts(folder / "texts.json", [made] * samples * 2)
    return str(folder / "texts.json")


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_counted_on_fake_tensors_are_those_of_trls_real_step(tmp_path, recompute):
    texts = equal_texts(tmp_path, samples=2, text=40, learned=20)
    job = Job("trl", "tiny", "cpu", str(tmp_path), texts, 2, batch=2, recompute=recompute, lora_r=4)
    trainer = build(job, []).trainer
    with counter() as counted:
        trainer.train()
    expected = flops.trl_step(shapes.tiny(), samples=2, text=40, learned=None, recompute=recompute, lora_r=4)
    assert counted.get_total_flops() == pytest.approx(2 * expected, rel=0.001)


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_counted_on_fake_tensors_are_those_of_our_real_step(tmp_path, recompute):
    texts = equal_texts(tmp_path, samples=3, text=40, learned=20)
    job = Job("qllava", "tiny", "cpu", str(tmp_path), texts, 3, recompute=recompute, lora_r=4)
    system = build(job, [])
    config = shapes.tiny()
    row = lay_out([system.rows.dataset[n] for n in range(3)], config.image_token_index)
    assert row.groups[0].prefix > 4
    with counter() as counted:
        system.trainer.train()
    expected = flops.count_pack(config, row, recompute=recompute, shortcuts=flops.Shortcuts(), lora_r=4)
    assert counted.get_total_flops() == pytest.approx(2 * expected, rel=0.001)


def test_flops_are_those_of_the_formula():
    """Forward 2, and 2 for the inputs' gradients, per frozen parameter and token; LoRA's and attention's besides."""
    config = shapes.tiny()
    text = config.text_config
    width, mlp, layers, tokens, r = text.hidden_size, text.intermediate_size, text.num_hidden_layers, 204, 4
    heads = width // text.num_attention_heads * text.num_key_value_heads
    shaped = [(width, width), (width, heads), (width, heads), (width, width), *[(width, mlp)] * 2, (mlp, width)]
    frozen = sum(a * b for a, b in shaped)
    lora = sum((a + b) * r for a, b in shaped)
    attention = 2 * 2 * tokens * tokens * width
    head = 6 * 100 * width * text.vocab_size
    by_hand = layers * (4 * frozen * tokens + 6 * lora * tokens + 3.5 * attention) + head
    counted = flops.trl_step(config, recompute=False, lora_r=r)
    assert counted == pytest.approx(by_hand, rel=0.02)
    again = flops.trl_step(config, recompute=True, lora_r=r) - counted
    assert again == pytest.approx(layers * (2 * frozen * tokens + 2 * lora * tokens + attention), rel=0.02)


def test_each_shortcut_costs_flops_when_it_is_off():
    config = shapes.tiny()
    all_on = flops.qllava_step(config, samples=2, recompute=True)
    for name in flops.Shortcuts.__dataclass_fields__:
        off = flops.Shortcuts(**{name: False})
        assert flops.qllava_step(config, samples=2, recompute=True, shortcuts=off) > all_on, name


# The commands


def test_throughput_compares_three_systems(tmp_path, capsys):
    out = tmp_path / "out.json"
    line = ["--tiny", "--samples-per-image", "3", "--repetitions", "1", "--samples-per-step", "3", "--json", str(out)]
    assert throughput.main(line) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [entry["system"] for entry in found] == ["trl", "trl_tuned", "qllava"]
    assert all(entry.keys() >= KEYS | {"date", "machine", "commit"} for entry in found)
    assert found[0]["ratio"] == 1 and found[2]["useful_tokens"] == 1 > found[0]["useful_tokens"]
    assert found[2]["tflop_per_sample"] <= found[1]["tflop_per_sample"]
    assert "| trl_tuned |" in capsys.readouterr().out


PRESET = Path(__file__).resolve().parents[1] / "recipes" / "llava15_7b_8gb.yaml"


@pytest.mark.parametrize("step", ["quick", "memory", "throughput", "fp16"])
def test_each_step_for_a_gpu_runs_on_a_cpu(step, tmp_path):
    out = tmp_path / "gpu"
    line = ["--device", "cpu", "--tiny", "--samples-per-image", "1", "--repetitions", "1", "--samples-per-step", "1"]
    kept = {**machine.provenance("cpu"), "fp16": [], "kept": [{"of another step": 1}]}
    out.with_suffix(".json").write_text(json.dumps(kept), encoding="utf-8")
    assert gpu.main([*line, f"--{step}", "--preset", str(PRESET), "--cap", "8", "--out", str(out)]) == 0
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert found["kept"] == kept["kept"]
    if step == "quick":
        assert found["ceiling"][0]["tflops"] > 0 and found["kernels"][0]["milliseconds"] > 0
        assert [line["system"] for line in found["step"]] == ["trl", "trl_tuned", "qllava"]
    elif step == "memory":
        assert [line["phase"] for line in found["memory"]] == ["before", "step", "evaluation", "chat"]
        assert all(line["planned_gb"] > 0 and line["ended_by"] == "" for line in found["memory"])
    elif step == "throughput":
        assert len(found["throughput"]) == 3
        assert "aten::" in (tmp_path / "gpu.tiny.profile.txt").read_text(encoding="utf-8")
    else:
        assert len(found["fp16"]) == 2 and found["fp16"][0]["loss"] == pytest.approx(found["fp16"][1]["loss"])
    assert "## " in out.with_suffix(".md").read_text(encoding="utf-8")


def test_a_step_that_is_given_again_measures_what_is_missing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu.phases, "lines_of", lambda case: asked.append(case.cap_gb) or [line_of(case)])

    def line_of(case):
        return {"preset": Path(case.preset).stem, "cap_gb": case.cap_gb, "phase": "step"}

    line = ["--device", "cpu", "--memory", "--preset", str(PRESET), "--cap", "8", "12", "--out", str(tmp_path / "gpu")]
    assert gpu.main([*line, "--minutes", "-1"]) == 0 and asked == []
    assert gpu.main([*line[:-3], *line[-2:]]) == 0 and asked == [8]
    assert gpu.main(line) == 0 and asked == [8, 12]


def test_the_systems_begin_and_end_alike(tmp_path):
    texts = make_texts(tmp_path / "pictures", side=28, samples_per_image=3, samples_per_step=3, steps=4, seed=0)
    write_texts(tmp_path / "texts.json", texts)
    losses, digests = [], []
    for system in ("trl", "trl_tuned", "qllava"):
        job = Job(system, "tiny", "cpu", str(tmp_path / system), str(tmp_path / "texts.json"), 3, lora_r=4)
        built = build(job, [])
        before = mean_loss(built, range(12), "cpu")
        built.trainer.train()
        digests.append(built.digest)
        losses.append(mean_loss(built, range(12), "cpu"))
        assert losses[-1] < before - 0.01
    assert len(set(digests)) == 1
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_a_system_that_fails_says_why(tmp_path):
    with pytest.raises(Failed, match=r"none\.json") as caught:
        Worker(Job("qllava", "tiny", "cpu", str(tmp_path), str(tmp_path / "none.json"), 1))
    assert not caught.value.out_of_memory


def test_the_cards_are_asked_for(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 1
    assert "No CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a child is counted in kilobytes on Linux")
def test_peak_memory_of_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a tiny size: the figures are there, and are of the command."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(merge_memory, "SHAPES", {"tiny": small})
    monkeypatch.setattr(merge_memory, "CLIP_L", small)
    monkeypatch.setattr(merge_memory, "PROBES", 3)
    found = merge_memory.measure("tiny", tmp_path, 0.002)
    assert found.verified and found.bound_gb == 1.5 and 0.2 < found.peak_gb < 2
    assert len(list((tmp_path / "tiny-2MB" / "llama").glob("model-*.safetensors"))) > 1
    merged = next((tmp_path / "tiny-2MB").glob("merged-*"))
    assert found.parameters == sum(
        tensor.numel()
        for shard in merged.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
        if name.startswith("language_model.")
    )


def test_what_each_way_of_serving_costs(tiny: Tiny, tmp_path: Path) -> None:
    ways = {line["way"]: line for line in serving_loss.measure(tiny.stage2, tmp_path)}
    assert list(ways) == ["merged", "merged_original", "merged_nf4_again", "merged_q8_0"]
    # Rounding to 8 bit costs less than the original weights, which are another model; 16 bit costs least.
    assert 0 <= ways["merged"]["kl_per_token"] < ways["merged_q8_0"]["kl_per_token"]
    assert ways["merged_q8_0"]["kl_per_token"] < ways["merged_original"]["kl_per_token"]


def test_q8_0_rounds_a_little() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    found = serving_loss.q8_0(weight)
    assert 0 < (found - weight).abs().max() <= weight.abs().max() / 127


# Captions


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_the_filters_benchmark_holds_what_was_kept_against_what_it_made(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    line = ["--captions", "2000", "--concepts", "1500", "--folder", str(tmp_path / "data"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["filter_million.py", *line])
    assert filter_million.main() == 0
    result = json.loads(out.read_text())
    assert result["as_defined"] and 0 < result["captions_after"] < 2000
    assert 1e7 < result["peak_bytes"] < 1e9 and result["heavy_imports"] == []
    names = [filter_million.concept(number) for number in range(40_000)]
    assert len(set(names)) == len(names)
    monkeypatch.setattr(filter_million, "plainly", lambda *_: {0, 1})
    assert filter_million.main() == 1


def test_few_shot_compares_the_ways_to_choose(tmp_path: Path) -> None:
    chat = load(str(make_tiny_llava(tmp_path / "model")))
    rows = []
    for number in range(8):
        make_image((30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"question": f"How red is {number}?", "image": f"{number}.png", "answer": "?", "type": "colour"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    examples = read_examples(tmp_path / "rows.json")
    lines = few_shot.measure(chat, examples[:2], examples[2:])
    assert [(line["choose"], line["shots"]) for line in lines] == [
        ("none", 0),
        *((choose, count) for choose in ("random", "text", "picture") for count in (1, 2, 4)),
    ]
    assert all(line["accuracy"] * 2 == 2 * lines[0]["accuracy"] + line["gained"] - line["lost"] for line in lines)
    assert few_shot.same_in_batches(chat, examples) == {"questions": 8, "same": 8}


# Rules beside captions


def test_rows_of_both_systems_are_of_the_same_images(tmp_path: Path) -> None:
    files = [rules_vs_naive.make(kind, 0, 5, tmp_path) for kind in ("rules", "naive")]
    rules, naive = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert [row["image"] for row in rules] == [row["image"] for row in naive]
    assert {len(row["conversations"]) for row in naive} == {2} and len(rules[0]["conversations"]) == 20


def test_points_are_differences_of_means() -> None:
    runs = {"rules": [{"accuracy": 0.9}, {"accuracy": 0.8}], "naive": [{"accuracy": 0.2}]}
    out = rules_vs_naive.summary(0.95, runs)
    assert out["points_below_main"] == pytest.approx(10) and out["points_above_naive"] == pytest.approx(65)
    assert "points_above_naive" not in rules_vs_naive.summary(0.95, runs | {"naive": []})


# Planned memory


@pytest.mark.parametrize("shape", ["tiny", "cpu_bench"])
def test_a_sample_fills_a_pack_of_the_size_that_is_planned(shape: str) -> None:
    """With shorter samples the plan counts a larger step than is measured, and what is missing in it stays unseen."""
    config, tokens = plan_memory.shape_of(shape), 1024
    tokenizer = plan_memory._tokenizer()
    assert len(tokenizer) < config.text_config.vocab_size, "a run refuses a tokenizer that the model does not hold"
    text = plan_memory.WORDS * plan_memory.QUESTION + plan_memory.answer_that_fills(config, tokens)
    length = ImageLayout.of_config(config).tokens + len(tokenizer(text)["input_ids"]) + plan_memory.FRAME
    sentence = len(tokenizer(plan_memory.WORDS)["input_ids"])
    assert tokens - 2 * sentence < length <= tokens


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's figures")
def test_what_is_in_use_is_what_was_given_out() -> None:
    """A small block of the heap, and a large one that is a mapping of its own; gone when they are freed."""
    before = plan_memory._in_use()
    held = [torch.empty(1 << 16, dtype=torch.uint8), torch.empty(64 << 20, dtype=torch.uint8)]
    size = sum(block.nbytes for block in held)
    assert plan_memory._in_use() - before == pytest.approx(size, rel=0.01)
    del held
    assert abs(plan_memory._in_use() - before) < 1 << 16


def test_a_phase_is_compared_beyond_a_model_of_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = iter([dict.fromkeys(plan_memory.PHASES, 10 << 20), dict.fromkeys(plan_memory.PHASES, 110 << 20)])
    peaks = iter([40, 40, 140, 165])  # a run and a chat without size, a run and a chat with it

    def measured(line: list[str], give_back: bool) -> plan_memory.Peaks:
        size = next(peaks) << 20
        phases = dict.fromkeys(plan_memory.PHASES, size)
        return {"in_use": phases, "taken": dict.fromkeys(phases, 2 * size)}

    monkeypatch.setattr(plan_memory, "planned", lambda *_: next(plans))
    monkeypatch.setattr(plan_memory, "_measured", measured)
    lines = {line["phase"]: line for line in plan_memory.compared("cpu_bench", 1024)}
    assert all(line["planned_mb"] == 100 for line in lines.values())
    assert lines["step"]["ratio_in_use"] == 1 and lines["step"]["ratio_taken"] == 0.5
    assert lines["chat"]["in_use_mb"] == 125 and lines["chat"]["ratio_in_use"] == 0.8
