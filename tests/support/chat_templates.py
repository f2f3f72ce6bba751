"""Small chat templates that treat reasoning and tools as those of well-known models do."""

from __future__ import annotations

_TURN = "<|im_start|>{{ m.role }}\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

# Reasoning only in the answers after the last question, as Qwen3. It is read from a field, or from <think> tags.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set r = m.reasoning_content or '' %}{% if not r and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}" + _TURN + "{% if loop.index0 > ns.last and "
    "(loop.last or r) %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}{% for call in m.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ c }}\n</tool_response><|im_end|>\n"
    "{% else %}" + _TURN + "{{ c }}<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT
)

# No answer with its reasoning, and a prompt that opens it, as the distilled models of DeepSeek-R1.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>{% else %}User: {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)

# Reasoning as it is in the content, as SmolLM3 with /think.
SMOLLM3 = (
    "{% for m in messages %}"
    + _TURN
    + "{{ m.content.lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}" + _PROMPT
)

# Channels, and another token at the end of the last turn, as gpt-oss.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|im_start|>assistant"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}<|im_start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|im_start|>{{ m.role }}<|message|>"
    "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)

# Tools and calls in tags, as Hermes.
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}<tool_response>\n"
    "{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}" + _PROMPT
)

# One call for each answer, as JSON without tags, as Llama 3.1.
LLAMA31 = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('only one tool call at once') }}{% endif %}<|im_start|>assistant\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>ipython\n{{ m.content | tojson }}<|im_end|>\n{% else %}"
    + _TURN
    + "{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}"
    + _PROMPT
)

# No generation prompt, and all calls in one list, as Mistral.
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
    "[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]<|im_end|>{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)

# Reasoning in parts of the content, between control tokens, and no generation prompt, as Magistral and Ministral 3.
MAGISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{% endif %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for b in m['content'] %}{% if b['type'] == 'text' %}{{ b['text'] }}{% elif b['type'] == 'thinking' %}"
    "{{ '[THINK]' + b['thinking'] + '[/THINK]' }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ '[/SYSTEM_PROMPT]' if m.role == 'system' else '<|im_end|>' }}{% endif %}{% endfor %}"
)
