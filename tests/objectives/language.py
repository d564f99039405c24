"""A language model of two small layers, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loratlas import AtlasLoraConfig

VOCAB = 23


def llama(seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=32, pad_token_id=0, **sizes))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)  # born so small that its logits would be nearly equal
    return model


def adapted(init: Any = True, **options: Any) -> PeftModel:
    config = AtlasLoraConfig(r=2, init_weights=init, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(llama(), config)
    assert isinstance(model, PeftModel)
    return model


def batch(rows: int = 3, tokens: int = 8, question: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random texts; the question's labels are masked, and the last row's text is one token shorter."""
    ids = torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :question] = -100
    ids[-1, -1], labels[-1, -1], mask[-1, -1] = 0, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
