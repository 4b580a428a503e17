"""Chat templates in the styles that checkpoints bring, written anew: what they use of Jinja is what must be rendered."""
# ruff: noqa: E501  (published templates have long lines)

from __future__ import annotations

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES: dict[str, str] = {
    "chatml": CHATML,
    "chatml with a default system prompt": """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must take turns') }}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama 3": """{% set loop_messages = messages %}{% for m in loop_messages %}
{%- set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "llama 3.1 with tools and a date": """{{- bos_token }}{%- if not date_string is defined %}
{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}{{- 'Functions:\\n' }}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{%- endif %}{{- system_message }}{{- '<|eot_id|>' }}{%- for message in messages %}
{%- if message.role == 'tool' or message.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if message.content is mapping or message.content is iterable and message.content is not string %}
{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}{%- if not message.tool_calls | length == 1 %}
{{- raise_exception('one call at a time') }}{%- endif %}{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{- message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}""",
    "mistral with tools": """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}{{- bos_token }}
{%- for message in loop_messages %}{%- if message["role"] == "user" %}
{%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
{%- for key, val in tool.items() if key != "return" %}{%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
{%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}
{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}{%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}
{%- endif %}{%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- "[TOOL_CALLS] [" }}
{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function | tojson %}{{- out[:-1] }}{{- ', "id": "c"}' }}
{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}{%- endfor %}
{%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
{%- else %}{{- "[TOOL_RESULTS] " + (message.content | string) + "[/TOOL_RESULTS]" }}{%- endif %}{%- endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{%- else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "gemma 3 with parts": """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\\n\\n' -%}
{%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + (first if loop.first else "") }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}
{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<image>' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
{%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}{{ '<end_of_turn>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}""",
    "phi 3": """{% for message in messages %}{% if message['role'] in ['system', 'user'] %}{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}
{%- elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "phi 4": """{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}
{%- elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}
{%- elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>'}}{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
    "qwen 2.5 with tools": """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
{%- else %}{{- 'You are Q.' }}{%- endif %}{{- "\\n\\n# Tools\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}
{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}{%- else %}{%- if messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endif %}
{%- for message in messages %}{%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- elif message.role == "assistant" %}{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- elif message.role == "tool" %}
{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
{%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "qwen 3 with thinking": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and message.content is string and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
{%- if message.role == "assistant" %}{%- set reasoning_content = '' %}{%- if message.reasoning_content is string %}
{%- set reasoning_content = message.reasoning_content %}{%- elif '</think>' in content %}
{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
{{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}""",
    "harmony": """{%- macro render_type(spec) -%}{%- if spec.type == 'array' -%}{{- render_type(spec['items']) + '[]' -}}
{%- elif spec.enum is defined -%}{{- '"' + spec.enum | join('" | "') + '"' -}}{%- elif spec.type == 'integer' -%}{{- 'number' -}}
{%- else -%}{{- spec.type -}}{%- endif -%}{%- endmacro -%}
{%- macro render_tools(tools) -%}{{- '## functions\\n\\nnamespace functions {\\n\\n' }}{%- for tool in tools %}{%- set tool = tool.function %}
{{- '// ' + tool.description + '\\ntype ' + tool.name + ' = (_: {\\n' }}
{%- for name, spec in tool.parameters.properties.items() %}{{- name }}{%- if name not in (tool.parameters.required or []) %}{{- '?' }}{%- endif %}
{{- ': ' + render_type(spec) + (',' if not loop.last else '') + '\\n' }}{%- endfor %}{{- '}) => any;\\n\\n' }}{%- endfor %}{{- '} // namespace functions' }}
{%- endmacro -%}
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') + '<|end|>' }}
{%- if messages[0].role in ['developer', 'system'] %}{%- set developer = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set developer = '' %}{%- set loop_messages = messages %}{%- endif %}
{%- if developer or tools %}{{- '<|start|>developer<|message|>' }}{%- if developer %}{{- '# Instructions\\n\\n' + developer + '\\n\\n' }}{%- endif %}
{%- if tools %}{{- '# Tools\\n\\n' + render_tools(tools) }}{%- endif %}{{- '<|end|>' }}{%- endif %}
{%- set last_tool_call = namespace(name=none) %}{%- for message in loop_messages -%}
{%- if message.role == 'assistant' -%}{%- if 'tool_calls' in message %}{%- if message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
{%- set last_tool_call.name = message.tool_calls[0].function.name %}
{{- '<|start|>assistant to=functions.' + last_tool_call.name + '<|channel|>commentary json<|message|>' + message.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}{%- if 'thinking' in message %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- set last_tool_call.name = none %}{%- endif %}
{%- elif message.role == 'tool' -%}{%- if last_tool_call.name is none %}{{- raise_exception('a tool result without a call') }}{%- endif %}
{{- '<|start|>functions.' + last_tool_call.name + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}
{%- else -%}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    "deepseek": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "vicuna": """{%- set roles = {'user': 'USER', 'assistant': 'ASSISTANT'} -%}
{{ bos_token }}A chat. {% for m in messages if m.role in roles %}{{ roles[m.role] }}: {{ m.content | trim }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}""",
    "alpaca": """{% for m in messages %}### {{ {'user': 'Instruction', 'assistant': 'Response'}.get(m['role'], m['role'] | capitalize) }}:
{{ m['content'] }}

{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}""",
    "command r with documents": """{{ bos_token }}{% if documents %}{{ '<|START|>' }}{% for document in documents %}{% set id = loop.index0 %}
{{- '\\nDocument: ' ~ id ~ '\\n' }}{% for key, value in document.items() %}{{ key ~ '\\n' ~ value }}{{ '\\n' if not loop.last }}{% endfor %}{% endfor %}{{ '<|END|>' }}{% endif %}
{%- for message in messages %}{{ '<|' ~ message.role | upper ~ '_TOKEN|>' ~ message.content | trim ~ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|CHATBOT_TOKEN|>' }}{% endif %}""",
    "granite": """{%- set date = strftime_now('%B') %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set system = 'Knowledge Cutoff.\\nMonth: ' + date + '.' %}{%- set loop_messages = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}{%- for message in loop_messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end_of_role|>' }}{%- endif %}{%- endfor %}""",
    "olmo": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "smollm 3 with modes": """{%- set system = namespace(text='', mode='/think') -%}{%- if messages[0].role == "system" -%}{%- set system.text = messages[0].content -%}
{%- if "/no_think" in system.text -%}{%- set system.mode = "/no_think" -%}{%- set system.text = system.text.replace("/no_think", "").rstrip() -%}{%- endif -%}{%- endif -%}
{{- "<|im_start|>system\\nReasoning Mode: " + system.mode + "\\n\\n" }}{%- if system.text -%}{{- system.text ~ "\\n\\n" -}}{%- endif -%}{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}{%- if message.role == "system" -%}{%- continue -%}{%- endif -%}
{%- if message.role == "assistant" -%}{%- generation -%}{{- "<|im_start|>assistant\\n" + (message.content if message.content is string else "") + "<|im_end|>\\n" -}}{%- endgeneration -%}
{%- else -%}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}""",
    "a break at the first answer": """{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- break -%}{%- endif -%}[{{ loop.index }}/{{ loop.length }} {{ m.content | upper }} {{ loop.cycle('a', 'b') }}]{%- endfor -%}""",
    "call blocks, filters, sets and tests": """{%- macro turn(role) -%}<{{ role }}>{{ caller() }}</{{ role }}>{%- endmacro -%}
{%- for m in messages %}{% call turn(m.role) %}{% filter trim | replace('e', '3') %}  {{ m.content }}  {% endfilter %}{% endcall %}{% endfor %}
{%- set tail %}{{ messages | map(attribute='role') | unique | sort | join(',') }}{% endset %}{{ tail }}
{{- messages | rejectattr('role', 'in', ['system']) | list | length }}{{ messages | groupby('role') | map('first') | join(' ') }}
{{- ('%s-%d' % ('x', 3)) ~ "{:>5}".format(7) ~ (7 // 2) ~ (2 ** 5) ~ [1, 2] * 2 ~ ('ab' * 2) ~ (messages | first).role[::-1] ~ 3.5 | round | int }}""",
    "with blocks and defaults": """{% with a = 1, b = messages | length %}{{ a + b }}{% endwith %}{{ missing | default('none') }}{{ missing is undefined }}
{%- for m in messages | sort(attribute='role') %}
  {{ m.role | title }} {{ m.content | wordcount }} {{ m.content[:3] }} {{ m.content | truncate(9, True, '...') }}
{% else %}
  nobody
{% endfor %}
{{ {'b': 1, 'a': [1.5, none, true]} | tojson(sort_keys=true) }}{{ {'x': {}} | tojson(indent=2, separators=(',', ' : ')) }}
{{ dict(a=1).items() | list }}{{ [3, 1, 2] | sort(reverse=true) | join('-') }} {{ messages[-1].content | indent(4, first=true) }}""",
    "text marked in pieces": """{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{% set words = m.content.split(' ') %}
{%- for word in words %}{{ word }} {% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{% endfor %}""",
}
