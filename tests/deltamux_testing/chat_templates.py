"""Chat templates in the shapes of well-known models', and small tokenizers with their special tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "answer: (yes) no, the answer is (no) and yes again; what is it?",
    "the user asks the assistant what the system is, and it answers: yes, it is.",
]


@dataclass(frozen=True)
class Shape:
    """A chat template and its tokenizer's special tokens.

    Attributes:
        end: the token that closes the assistant's turn; the tokenizer's end-of-sequence token, unless `eos` is another.
        system: whether the template takes a system message.
        answer: what is learnt of an answer, before the end token; ``{}`` is the content.
    """

    template: str
    end: str
    specials: tuple[str, ...]
    eos: str | None = None
    bos: str | None = None
    system: bool = True
    answer: str = "{}"
    metaspace: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        specials = sorted({*self.specials, self.end, *filter(None, (self.eos, self.bos))})
        make = metaspace if self.metaspace else byte_level
        return make(specials, eos=self.eos or self.end, bos=self.bos, chat_template=self.template)

    @property
    def ends(self) -> frozenset[int]:
        """What the server stops at: the end token is in the generation config where it is not the tokenizer's."""
        vocabulary = self.tokenizer.get_vocab()
        return frozenset(vocabulary[token] for token in (self.end, self.eos or self.end))


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Returns the text of token ids, special tokens included."""
    text = tokenizer.decode([*ids])
    assert isinstance(text, str)
    return text


def byte_level(
    specials: list[str], *, eos: str, bos: str | None, chat_template: str | None, add_prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 4, trainer)
    return _wrapped(bpe, eos, bos, chat_template)


def metaspace(
    specials: list[str], *, eos: str, bos: str | None, chat_template: str | None, first_alone: bool = False
) -> PreTrainedTokenizerFast:
    """A BPE over text whose spaces are ▁, with bytes for what its vocabulary lacks.

    One ▁ more is put before every text between special tokens, or (`first_alone`) of what begins with a text.
    """
    pieces = ["<unk>", *(s for s in specials if s != "<unk>"), *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator(TEXT * 4, trainer)
    state = bpe.model
    made = Tokenizer(state)
    if first_alone:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = bpe.normalizer
    made.add_special_tokens([s for s in pieces if not s.startswith("<0x")])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(made, eos, bos, chat_template)


def _wrapped(tokenizer: Tokenizer, eos: str, bos: str | None, chat_template: str | None) -> PreTrainedTokenizerFast:
    if bos:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, number)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it so
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        pad_token=eos,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ALWAYS_THINKS = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")

QWEN25 = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{{- messages[0].content if messages[0].role == 'system' else 'You help.' }}
{{- '\\n\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls %}
{{- '\\n<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content %}{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}
{{- '<|im_start|>assistant\\n' + content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
    "{{- '<think>\\n' }}",
)

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson }}{%- else %}{{- m['content'] | trim }}{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA2 = """\
{%- if messages[0].role == 'system' %}
{%- set rest = messages[1:] %}{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- else %}{%- set rest = messages %}{%- set system = '' %}{%- endif %}
{%- for m in rest %}
{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + m.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

MISTRAL = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate between user and assistant') }}
{%- endif %}
{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

R1 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- elif m.role == 'assistant' and m.content is none %}
{{- '<|Assistant|>' }}{%- for call in m.tool_calls %}{{- '<|call|>' + call.function.name }}{%- endfor %}{{- eos_token }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|Assistant|>' + content + '<|end_of_sentence|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

GLM4 = """\
[gMASK]<sop>
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

GLM47 = """\
[gMASK]<sop>
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content %}{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}{%- set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|assistant|>' + ('<think>' + thought if loop.index0 > ns.last and thought else '') + '</think>' }}
{%- if content.strip() %}{{- '\\n' + content.strip() }}{%- endif %}
{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>' }}{%- endif %}"""

LEAVES_THE_LAST_TURN_OPEN = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- if not (loop.last and m.role == 'assistant') %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

PARTS_ALONE = """\
<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}
{%- if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}
{%- for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}
{%- elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""SmolVLM's, which renders nothing of a content that is a text."""

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
SHAPES: dict[str, Shape] = {
    "chatml": Shape(CHATML, "<|im_end|>", _IM),
    "qwen2.5": Shape(QWEN25, "<|im_end|>", _IM),
    "qwen3": Shape(QWEN3, "<|im_end|>", _IM, answer="<think>\n\n</think>\n\n{}"),
    "qwen3-thinking": Shape(QWEN3_THINKING, "<|im_end|>", _IM, answer="\n</think>\n\n{}"),
    "always-thinks": Shape(ALWAYS_THINKS, "<|im_end|>", _IM, answer="\n</think>\n\n{}"),
    "llama3": Shape(
        LLAMA3,
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
    ),
    "llama2": Shape(LLAMA2, "</s>", (), bos="<s>", answer=" {} ", metaspace=True),
    "mistral": Shape(MISTRAL, "</s>", ("[INST]", "[/INST]"), bos="<s>", answer=" {}", metaspace=True),
    "gemma": Shape(GEMMA, "<end_of_turn>", ("<start_of_turn>",), eos="<eos>", bos="<bos>", system=False),
    "phi": Shape(PHI, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>"), eos="<|endoftext|>"),
    "glm4": Shape(GLM4, "<|user|>", ("<|system|>", "<|assistant|>", "[gMASK]", "<sop>"), eos="<|endoftext|>"),
    "glm4.7": Shape(
        GLM47,
        "<|user|>",
        ("<|system|>", "<|assistant|>", "[gMASK]", "<sop>"),
        eos="<|endoftext|>",
        answer="</think>\n{}",
    ),
    "last-turn-open": Shape(LEAVES_THE_LAST_TURN_OPEN, "<|im_end|>", _IM),
    "smolvlm": Shape(PARTS_ALONE, "<|im_end|>", _IM, answer=" {}"),
    "deepseek-r1": Shape(
        R1, "<|end_of_sentence|>", ("<|User|>", "<|Assistant|>"), bos="<|begin|>", answer="\n</think>\n\n{}"
    ),
}
