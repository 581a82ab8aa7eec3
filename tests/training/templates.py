"""Chat templates in the style of well-known ones, and a tokenizer that writes by one of them."""

from __future__ import annotations

from typing import Any

from tests import tiny

HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.content %}{{- message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and message.content) or not loop.first %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
"""Qwen2.5's and Hermes': tools in the system turn, answers of tools in the user's."""

LLAMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + messages[0].content | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if message.tool_calls is defined %}
            {%- if message.tool_calls | length != 1 %}{{- raise_exception('one tool call at a time') }}{% endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '{"name": "' + call.name + '", "parameters": ' }}
            {{- call.arguments | tojson }}
            {{- '}' }}
        {%- else %}
            {%- for tool in (tools or [] if loop.first else []) %}{{- tool | tojson + '\\n\\n' }}{% endfor %}
            {{- message.content | trim }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
"""Llama 3.1's: tools in the first user's turn, one call in a turn and no text beside it."""

THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
"""Qwen3's: what was thought is written of the last turn alone."""

PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}|"
    "{% endif %}{% endfor %}{{ '<end>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""As those of models that see images: contents are lists of parts, and nothing else is written."""

REFUSES = (
    "{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '<end>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

IGNORES = REFUSES.removeprefix("{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}")
"""Reads role and content, and nothing else."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def tokenizer(template: str, eos: str = "<|im_end|>") -> Any:
    """The tiny one, with a token that ends a turn."""
    made = tiny.tokenizer()
    made.add_special_tokens({"eos_token": eos, "bos_token": "<|begin|>"})
    made.chat_template = template
    return made


def call(city: str, **others: Any) -> dict[str, Any]:
    """A turn of the assistant's that asks for the weather, as OpenAI writes it."""
    function = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls, **others}


def said(tokenizer: Any, ids: Any) -> list[str]:
    """The texts that are learnt, one for each run of them."""
    runs, current = [], []
    tokens = [*ids.prompt_ids, *ids.completion_ids, None]
    for token, label in zip(tokens, [*ids.labels, -100], strict=True):
        if label != -100:
            assert token == label
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs
