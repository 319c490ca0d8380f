"""What an engine under a plan cannot have: one clear error at start, never a wrong answer."""

from __future__ import annotations

from .errors import ServingError

FAMILIES = {
    "LlavaForConditionalGeneration": "LLaVA-1.5",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "InternVLForConditionalGeneration": "InternVL",
    "InternVLChatModel": "InternVL",
}
PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")


def check_engine(config) -> None:
    """Raise ServingError naming the first setting of a VllmConfig that a plan cannot run with."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    text = model.hf_text_config
    architecture = model.architecture
    if architecture not in FAMILIES:
        raise ServingError(f"vis_sparse: model: got {architecture}, expected one of {', '.join(FAMILIES)}")
    refused = {
        "LoRA (--enable-lora)": config.lora_config is not None,
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "decode context parallelism (--decode-context-parallel-size)": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism (--prefill-context-parallel-size)": getattr(
            parallel, "prefill_context_parallel_size", 1
        )
        > 1,
        "microbatches (--enable-dbo)": getattr(parallel, "enable_dbo", False) or parallel.use_ubatching,
        "a KV connector (--kv-transfer-config)": config.kv_transfer_config is not None,
        "an encoder cache connector (--ec-transfer-config)": getattr(config, "ec_transfer_config", None) is not None,
        "prompt embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        "video token pruning (--video-pruning-rate)": bool(
            getattr(model.multimodal_config, "video_pruning_rate", None)
        ),
        "quantised weights (--quantization)": model.quantization is not None,
        "a quantised KV cache (--kv-cache-dtype)": config.cache_config.cache_dtype not in PLAIN_CACHES,
        "sliding-window attention": model.get_sliding_window() is not None,
        "bidirectional attention over images": model.is_mm_prefix_lm,
        "multi-head latent attention": model.use_mla,
        "an attention-free or hybrid text model": model.is_hybrid or model.is_attention_free,
        "a pooling model (--runner pooling)": model.runner_type != "generate",
        "shared KV for fast prefill (--kv-sharing-fast-prefill)": config.cache_config.kv_sharing_fast_prefill,
        "text-only serving (--language-model-only)": bool(
            getattr(model.multimodal_config, "language_model_only", False)
        ),
    }
    for what, found in refused.items():
        if found:
            raise ServingError(f"vis_sparse: got {what}, expected an engine without it under a plan")
    if getattr(text, "alibi", False):
        raise ServingError("vis_sparse: got ALiBi positions, expected rotary ones")
    if scheduler.max_num_batched_tokens is None:
        raise ServingError("vis_sparse: max_num_batched_tokens: got none, expected a number")
