"""Prompts that other programs write: the same text as transformers', wherever the client put its image."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qllava.conversation import TEMPLATES
from qllava.export.serving import for_llama_cpp, modelfile, template_of
from tests.tiny_models import make_tiny_processor

CHATS = [name for name in TEMPLATES if name != "plain"]
QUESTION = "What colour is the circle?"
# llama-cpp-python's, and one of those that llama-server draws.
MARKERS = ("<__media__>", "<__media_x7Kq2__>")


def by_transformers(chat_template: str, messages: list[Any]) -> str:
    processor = make_tiny_processor()
    processor.tokenizer.bos_token = "<s>"
    text: str = processor.apply_chat_template(messages, chat_template=chat_template, add_generation_prompt=True)
    return text


def by_llama_cpp(chat_template: str, messages: list[Any]) -> str:
    """Without any extension: there is none that every program has."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"messages": messages, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "<|im_end|>"}
    return environment.from_string(for_llama_cpp(chat_template)).render(**values)


def image_and(text: str) -> list[dict[str, str]]:
    return [{"type": "image"}, {"type": "text", "text": text}]


@pytest.mark.parametrize("name", CHATS)
class TestChatTemplate:
    @pytest.mark.parametrize("marker", MARKERS)
    def test_one_image(self, name: str, marker: str) -> None:
        written = TEMPLATES[name].chat_template()
        wanted = by_transformers(written, [{"role": "user", "content": image_and(QUESTION)}])
        assert f"<image>\n{QUESTION}" in wanted
        contents: list[Any] = [
            marker + QUESTION,
            f"{marker}\n{QUESTION}",
            QUESTION + marker,
            f"{QUESTION}\n{marker}",
            [{"type": "text", "text": marker}, {"type": "text", "text": QUESTION}],
            [{"type": "text", "text": QUESTION}, {"type": "text", "text": marker}],
        ]
        for content in contents:
            found = by_llama_cpp(written, [{"role": "user", "content": content}])
            assert found.replace(marker, "<image>") == wanted, content

    def test_a_conversation(self, name: str) -> None:
        written = TEMPLATES[name].chat_template()

        def turns(first: Any, two: Any) -> list[Any]:
            return [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": first},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "Where __> is it?"},
                {"role": "assistant", "content": "left"},
                {"role": "user", "content": two},
            ]

        two_images = [{"type": "image"}, *image_and("Which is larger?")]
        wanted = by_transformers(written, turns(image_and(QUESTION), two_images))
        marker = MARKERS[0]
        found = by_llama_cpp(written, turns(marker + QUESTION, marker + marker + "Which is larger?"))
        assert found.replace(marker, "<image>") == wanted
        assert wanted.count("<image>") == 3 and "Where __> is it?" in wanted

    def test_without_an_image(self, name: str) -> None:
        written = TEMPLATES[name].chat_template()
        messages = [{"role": "user", "content": QUESTION}]
        assert by_llama_cpp(written, messages) == by_transformers(written, messages)

    def test_is_recognized(self, name: str) -> None:
        assert template_of(TEMPLATES[name].chat_template()) is TEMPLATES[name]


def test_marks_of_what_is_learned_are_needed_no_more() -> None:
    written = TEMPLATES["chatml"].chat_template()
    with pytest.raises(jinja2.TemplateSyntaxError):
        ImmutableSandboxedEnvironment().from_string(written)
    assert "generation -%}" in written and "generation -%}" not in for_llama_cpp(written)


def test_another_template_stays_as_it_is() -> None:
    assert for_llama_cpp("{% for m in messages %}{{ m }}{% endfor %}") == "{% for m in messages %}{{ m }}{% endfor %}"


class TestModelfile:
    def test_chatml(self) -> None:
        found = modelfile("a.gguf", "mmproj-a.gguf", TEMPLATES["chatml"], None, "<|im_end|>", False)
        assert found.startswith("FROM ./a.gguf\nFROM ./mmproj-a.gguf\n")
        assert 'PARAMETER stop "<|im_end|>"' in found and "SYSTEM" not in found
        assert found.count('"""') == 2
        assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else }}" in found
        assert found.rstrip().endswith('PARAMETER stop "<|im_end|>"')

    def test_vicuna_writes_its_begin_unless_ollama_does(self) -> None:
        vicuna = TEMPLATES["vicuna_v1"]
        found = modelfile("a.gguf", "b.gguf", vicuna, "<s>", "</s>", False)
        assert "{{ $later := false }}<s>{{ range" in found and 'PARAMETER stop "</s>"' in found
        assert "USER: {{ .Content }} " in found and "ASSISTANT: {{ .Content }}</s>" in found
        assert f'SYSTEM """{vicuna.system}"""' in found
        assert "<s>" not in modelfile("a.gguf", "b.gguf", vicuna, "<s>", "</s>", True)

    def test_the_tokenizers_own_end(self) -> None:
        found = modelfile("a.gguf", "b.gguf", TEMPLATES["vicuna_v1"], None, "<|end|>", False)
        assert "<s>" not in found and "</s>" not in found and "{{ .Content }}<|end|>" in found

    def test_without_a_template_of_ours_ollama_looks_for_itself(self) -> None:
        assert "TEMPLATE" not in modelfile("a.gguf", "b.gguf", None, None, "</s>", False)
