"""Prompts in the programs that load a GGUF pair: llama.cpp uses a chat template, Ollama a Modelfile.

llama.cpp and the programs built on it do not know `<image>`. For each image they put a marker `<__media...__>` into the
text of a turn, at the client's position, and pass one string (or a list of texts) to the template. So in the template
saved with the model, the part that reads a turn is replaced: images come first, each followed by a newline, as in
training. The rest does not change. A template that is not ours is not changed at all.
"""

from __future__ import annotations

import re

from qllava.conversation import BOS, EOS, TEMPLATES, Template

_READ_TURN = r"""{%- macro content(message) -%}
{%- set said = namespace(whole='', text='', images='') -%}
{%- if message['content'] is string -%}{%- set said.whole = message['content'] -%}
{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set said.whole = said.whole ~ part['text'] -%}{%- endfor -%}{%- endif -%}
{%- for piece in said.whole.split('<__media') -%}
{%- if loop.first -%}{%- set said.text = piece -%}
{%- else -%}{%- set end = piece.split('__>') -%}
{%- set said.images = said.images ~ '<__media' ~ end[0] ~ '__>\n' -%}
{%- set said.text = said.text ~ (end[1:] | join('__>')) -%}{%- endif -%}{%- endfor -%}
{{- (said.images ~ (said.text | trim)) if said.images else said.text -}}
{%- endmacro -%}"""


def for_llama_cpp(chat_template: str) -> str:
    """Return the chat template for the GGUF file; a template that is not ours is returned unchanged."""
    if template_of(chat_template) is None:
        return chat_template
    served = re.sub(
        r"\{%- macro content\(message\) -%\}.*?\{%- endmacro -%\}", lambda _: _READ_TURN, chat_template, flags=re.DOTALL
    )
    # The marks of learned text are useless here, and some programs do not support them.
    return re.sub(r"\{%- (end)?generation -%\}", "", served)


def template_of(chat_template: str) -> Template | None:
    """Return the template of ours that this is; None for another one."""
    return next((template for template in TEMPLATES.values() if template.chat_template() == chat_template), None)


def modelfile(
    language_model: str, projector: str, template: Template | None, bos: str | None, eos: str, add_bos: bool
) -> str:
    """Return an Ollama Modelfile for the two files in the same folder.

    Args:
        language_model: File name of the language model.
        projector: File name of tower and projector.
        template: Template of the model; None for one that is not ours.
        bos: Begin-of-text token of the tokenizer; None without one.
        eos: End-of-text token of the tokenizer.
        add_bos: Whether Ollama adds the begin-of-text token, as the GGUF file tells it to.
    """
    lines = [f"FROM ./{language_model}", f"FROM ./{projector}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if template is not None:
        own = {BOS: "" if add_bos or bos is None else bos, EOS: eos}
        lines.append(f'TEMPLATE """{_go_template(template, own)}"""')
        stop = re.sub("|".join(own), lambda found: own[found.group()], template.end_of_turn).strip()
        lines.append(f'PARAMETER stop "{stop}"')
        if template.system:
            lines.append(f'SYSTEM """{template.system}"""')
    return "\n".join([*lines, ""])


def _go_template(template: Template, own: dict[str, str]) -> str:
    """Return the template in Go's template language for Ollama, without newlines other than those of the template."""

    def said(string: str) -> str:
        return re.sub("|".join(own), lambda found: own[found.group()], string)

    assistant = said(template.assistant_start)
    return "".join(
        [
            "{{ $later := false }}",
            said(template.begin),
            '{{ range .Messages }}{{ if eq .Role "system" }}',
            said(template.system_start) + "{{ .Content }}" + said(template.system_end),
            '{{ else if eq .Role "user" }}',
            "{{ if $later }}" + said(template.next_round) + "{{ end }}{{ $later = true }}",
            said(template.user_start) + "{{ .Content }}" + said(template.user_end),
            "{{ else }}",
            assistant + said(template.separator) + "{{ .Content }}" + said(template.end_of_turn),
            said(template.after_turn),
            "{{ end }}{{ end }}",
            assistant,
        ]
    )
