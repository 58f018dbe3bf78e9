"""How a prompt is written by the programs that load a GGUF pair: llama.cpp by a chat template, Ollama by a Modelfile.

llama.cpp and what is built on it know nothing of `<image>`. For each image they put a marker `<__media...__>` into
the text of a turn, wherever the client had it, and hand the template one string (or a list of texts). So the template
that was saved with the model gets another way to read a turn: images come first, each followed by a newline, as in
training. All else of it stays. A template that is not ours stays as it is.
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
    # Marks of what is learned: of no use here, and not every program knows them.
    return re.sub(r"\{%- (end)?generation -%\}", "", served)


def template_of(chat_template: str) -> Template | None:
    """Return which of our templates it is."""
    return next((template for template in TEMPLATES.values() if template.chat_template() == chat_template), None)


def modelfile(
    language_model: str, projector: str, template: Template | None, bos: str | None, eos: str, add_bos: bool
) -> str:
    """Return an Ollama Modelfile for the two files in the same folder.

    bos, eos: the tokenizer's own. add_bos: Ollama puts the begin of text there itself, as the file tells it to.
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
    """Return the template in Go's language, which Ollama takes; on one line but for newlines of the template itself."""

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
