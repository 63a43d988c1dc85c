"""Tiny random models of many decoder families, for tests that need one of each."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_STYLE = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Class of the configuration and what differs from COMMON.
FAMILIES = {
    "gpt2": ("GPT2Config", GPT2_STYLE),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2_STYLE),
    "gptj": ("GPTJConfig", {**GPT2_STYLE, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**GPT2_STYLE, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3_text": ("Gemma3TextConfig", {}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.0625}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "glm": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "helium": ("HeliumConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "persimmon": ("PersimmonConfig", {"num_key_value_heads": 4}),
    "biogpt": ("BioGptConfig", {}),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "mamba": ("MambaConfig", {"state_size": 8, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2Config",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8}),
    "falcon_h1": (
        "FalconH1Config",
        {
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    ),
    "jamba": (
        "JambaConfig",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
}


def tiny_config(family: str, **changes: object) -> transformers.PreTrainedConfig:
    """Configuration of a tiny model of `family`."""
    name, own = FAMILIES[family]
    fields = own if "vocab_size" in own else {**COMMON, **own}
    return getattr(transformers, name)(**{**fields, **changes})


def tiny_model(family: str, **changes: object) -> PreTrainedModel:
    """A tiny random model of `family`, in evaluation mode, with logits of a realistic size."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:  # biases and norms start at constants that would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
