"""Chat templates in the manner of the families they are named after, written for the tests."""

# ruff: noqa: E501  # lines of templates

BRACKETS = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and assistant must alternate') }}
    {%- endif -%}
    {%- if turn.role == 'user' -%}
        {{ bos_token ~ '[INST] ' ~ (system if loop.first else '') ~ turn.content.strip() ~ ' [/INST]' }}
    {%- else -%}
        {{ ' ' + turn.content | trim + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""
HEADERS = """
{{- bos_token }}
{%- if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}
{%- set ns = namespace(system='You help.') %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\nToday: ' + date[-4:] + '\\n' + ns.system + '<|eot|>' }}
{%- if tools is not none %}
    {{- 'Call one of these with JSON:\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) ~ '\\n\\n' }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|eot|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start|>ipython<|end|>\\n\\n' }}
        {{- message.content if message.content is string else message.content | tojson }}<|eot|>
    {%- else %}
        {{- '<|start|>' + message.role + '<|end|>\\n\\n' + message.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}
"""
MARKUP = """
{%- macro show(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{% if tools %}
{{ show('system', 'Tools: ' ~ tools | map(attribute='function.name') | join(', ')) }}
{%- elif messages[0]['role'] != 'system' -%}
{{ show('system', 'You are helpful.') }}
{%- endif %}
{% for m in messages %}
    {% if m.role == 'assistant' and '</think>' in m.content %}
{{- show(m.role, m.content.split('</think>')[-1].lstrip('\\n')) }}
    {%- else %}
{{- show(m.role, m.content) }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
INSTRUCT = """{{ bos_token }}{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- for m in messages if m.role != 'system' %}
  {%- if m.role == 'user' %}
    {%- if tools and m == last %}[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}
    {{- '[INST] ' }}
    {%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content ~ '\\n\\n' }}{% endif %}
    {{- m.content }}[/INST]
  {%- elif m.role == 'assistant' %}
    {%- generation %}{{ ' ' ~ m.content }}{{ eos_token }}{% endgeneration %}
  {%- endif %}
{%- endfor %}"""
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- if messages[0]['content'] is string -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
  {%- else -%}
    {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
  {%- endif -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set prefix, rest = '', messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- set role = {'assistant': 'model'}.get(m['role'], m['role']) -%}
  {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
  {%- if m['content'] is string -%}
    {{ m['content'] | trim }}
  {%- elif m['content'] is iterable -%}
    {%- for part in m['content'] -%}
      {%- if part['type'] != 'text' -%}{%- continue -%}{%- endif -%}
      {{ part['text'] | trim }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
PIPES = """{% for message in messages %}
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
{% endfor %}"""
ENDS = """{% for m in messages %}{{'<|' + m['role'] + '|>' + '\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
CHANNELS = """
{%- macro type_of(spec) -%}
  {%- if spec.type == 'array' -%}{{ type_of(spec['items']) }}[]
  {%- elif spec.enum is defined -%}{{ spec.enum | map('tojson') | join(' | ') }}
  {%- else -%}{{ spec.type }}{%- endif -%}
{%- endmacro -%}
{%- macro declare(tools) -%}
  {{- 'namespace functions {\\n\\n' }}
  {%- for tool in tools -%}
    {%- set f = tool.function -%}
    {{- '// ' ~ f.description ~ '\\ntype ' ~ f.name ~ ' = (_: {\\n' }}
    {%- for key, spec in f.parameters.properties.items() | sort(attribute='0') -%}
      {{- key ~ ('' if key in (f.parameters.required or []) else '?') ~ ': ' ~ type_of(spec) ~ ',\\n' }}
    {%- endfor -%}
    {{- '}) => any;\\n\\n' }}
  {%- endfor -%}
  {{- '} // namespace functions' }}
{%- endmacro -%}
{{- '<|start|>system<|message|>Knowledge: 2024\\nReasoning: ' ~ (reasoning_effort | default('low')) }}
{{- '<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|># Tools\\n\\n' }}{{ declare(tools) }}<|end|>{% endif %}
{%- for m in messages %}
  {%- if m.role == 'tool' %}
    {{- '<|start|>functions.' ~ (messages[loop.index0 - 1].tool_calls | first).function.name }}
    {{- ' to=assistant<|channel|>commentary<|message|>' ~ m.content | tojson ~ '<|end|>' }}
  {%- elif m.tool_calls is defined %}
    {%- for call in m.tool_calls %}
    {{- '<|start|>assistant to=functions.' ~ call.function.name ~ '<|message|>' }}
    {{- call.function.arguments | tojson(separators=(',', ':'), sort_keys=true) ~ '<|call|>' }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}
    {{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ '<|end|>' }}
  {%- else %}
    {{- '<|start|>' ~ {'system': 'developer'}.get(m.role, m.role) ~ '<|message|>' ~ m.content ~ '<|end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
STYLES = {
    "Llama 2": BRACKETS,
    "Llama 3": HEADERS,
    "ChatML": MARKUP,
    "Mistral": INSTRUCT,
    "Gemma": TURNS,
    "Zephyr": PIPES,
    "Phi 3": ENDS,
    "gpt-oss": CHANNELS,
}
