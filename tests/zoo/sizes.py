"""How far a config is shrunk, as data: a size per kind of field, and what single classes need instead."""

from typing import Any

VOCABULARY = 128

# Pattern of a field's name -> the largest value it may have. The first that matches counts.
SIZES: list[tuple[str, int]] = [
    (r"(num_)?(hidden_|decoder_|encoder_)?layers(_per_stack)?|n_layers?|num_layers|depth|num_blocks", 2),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"qk_nope_head_dim|\w*linear\w*head_dim|index_head_dim|\w*mamba_(d_)?head(_?dim)?", 16),
    (r"(\w+_)?head_dim|d_kv|d_head|kv_channels|dim_head|attention_head_size|v_head_dim", 16),
    (r"(num_|n_)?(decoder_|encoder_|swa_|sliding_)?(attention_)?(kv_|key_value_)heads|kv_n_heads|num_query_groups", 2),
    (r".*linear_num_key_heads", 2),
    (r"index_n_heads", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_mamba_heads", 2),
    (r"(num_|n_)?(\w+_)?(attention_)?heads?", 4),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"hidden_size_per_layer_input|ple_embed_dim", 16),
    (
        r"\w*hidden_size(_\w+)?|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim|projection_dim",
        64,
    ),
    (r"embed_dim|\w+_embedding_size|\w*hidden_dim|out_hidden_size|output_dim|lru_width|attention_hidden_size", 64),
    (r"mamba_d_ssm", 128),
    (r"\w*intermediate_size(_\w+)?|\w*ffn\w*(dim|size)|d_ff|dff|dim_ff|d_inner|n_inner|mlp_dim|share_expert_dim", 64),
    (r"feed_forward_size", 64),
    (r"\w*vocab_size(_\w+)?", VOCABULARY),
    (r"\w*lora_rank|laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank", 16),
    (r"moe_num_experts|n_routed_experts|num_local_experts|num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (
        r"n_groups?|topk_group|num_expert_group|mamba_n_groups|n_shared_experts|num_shared_experts|moe_num_shared_experts",
        1,
    ),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"\w*(d_state|state_size|ssm_state_size)", 16),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"\w*chunk_size", 16),
    (r"sliding_window(_size)?|local_attention|attention_window_size|attention_chunk_size|window_size", 16),
    (r"num_position_embeddings|max_image_size|max_img_size", 256),
    (r"max_position_embeddings|n_positions|n_ctx|max_target_positions|max_seq_len|model_max_length", 512),
    (r"index_topk", 4096),
    (r"base_channels", 32),
    (r"num_hidden_groups|num_mem_blocks", 1),
]

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_BOTH = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_SECTIONS = {**_ROPE, "mrope_section": [4, 2, 2]}
_MAP = {"<image>": 100, "IMGIMGAAZ": 101, "<|extra_200|>": 102}
_PARTLY = {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4096,
    "indexer_compress_ratio": 4,
}
# Four layers, the last two of which read the keys of the first two.
_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}

# Class -> fields of its config, or of the text config in it, that are set as they are here.
INSTEAD: dict[str, dict[str, Any]] = {
    "AyaVisionForConditionalGeneration": {"sliding_window": 16},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {"self": {"encoder_hash_byte_group_vocab": 512}},
    "ChameleonForConditionalGeneration": {"self": {"vocabulary_map": _MAP}},
    "CohereCompassForCausalLM": {"rope_parameters": _BOTH},
    "CohereCompassForConditionalGeneration": {"rope_parameters": _BOTH},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "DeepseekOcr2ForConditionalGeneration": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DiffusionGemmaForBlockDiffusion": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteForConditionalGeneration": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "Emu3ForConditionalGeneration": {"self": {"vocabulary_map": _MAP}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]}},
    "FalconH1ForCausalLM": {"mamba_d_head": 16, "mamba_n_heads": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "Gemma3nForCausalLM": _SHARED,
    "Gemma4ForCausalLM": _SHARED,
    "Gemma4AssistantForCausalLM": {"num_kv_shared_layers": 2},
    "Gemma4UnifiedAssistantForCausalLM": {"num_kv_shared_layers": 2},
    "Gemma4UnifiedForCausalLM": _SHARED,
    "Gemma4ForConditionalGeneration": _SHARED,
    "Gemma4UnifiedForConditionalGeneration": _SHARED,
    "Glm46VForConditionalGeneration": {"rope_parameters": _PARTLY},
    "Glm4vForConditionalGeneration": {"rope_parameters": _PARTLY},
    "Glm4vMoeForConditionalGeneration": {"rope_parameters": _PARTLY},
    "GlmOcrForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "Granite4VisionForConditionalGeneration": {
        "self": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]}
    },
    "HrmTextForCausalLM": {"num_layers_per_stack": None, "H_cycles": 1, "L_cycles": 1},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "HunYuanVLForConditionalGeneration": {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "Lfm2VlForConditionalGeneration": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16},
    "MinistralForCausalLM": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral4ForCausalLM": {"rope_parameters": None},
    "MistralLarge4ForConditionalGeneration": {"kv_source_layers": None},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "MoshiForCausalLM": {"sliding_window": 4096},
    "MusicgenForCausalLM": {"num_codebooks": 1, "pad_token_id": 0},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1, "pad_token_id": 0},
    "NemotronForCausalLM": {"head_dim": 16, "num_key_value_heads": 2},
    "PaddleOCRVLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen2VLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen2_5_VLForConditionalGeneration": {"rope_parameters": _SECTIONS},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "rope_parameters": _SECTIONS,
        "self": {"vision_start_token_id": 120, "vision_end_token_id": 121},
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"self": {"vision_start_token_id": 120, "vision_end_token_id": 121}},
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": _INDEXER,
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "Step3p7ForConditionalGeneration": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "XLNetLMHeadModel": {"d_head": 16, "d_inner": 64},
    "XmodForCausalLM": {"default_language": "en_XX", "is_decoder": True},
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128},
    "ZambaForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}

# Class -> what its config must be given to be valid at all.
VALID: dict[str, dict[str, Any]] = {
    "Gemma4AssistantForCausalLM": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}

# The same for a model that is to have one layer of full attention and no other.
ALONE: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [0]},
    "DeepseekOcr2ForConditionalGeneration": {"mlp_layer_types": ["dense"]},
    "GPTNeoForCausalLM": {"attention_types": [[["global"], 1]], "attention_layers": ["global"]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["full_attention"]},
    "JambaForCausalLM": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention"]},
    "Lfm2VlForConditionalGeneration": {"full_attn_idxs": [0], "layer_types": ["full_attention"]},
    "Lfm2ForCausalLM": {"full_attn_idxs": [0], "layer_types": ["full_attention"]},
    "ZambaForCausalLM": {"num_hidden_layers": 1, "layers_block_type": ["hybrid"]},
}

BERT_LIKE = (
    "BertLMHeadModel BertGenerationDecoder BigBirdForCausalLM CamembertForCausalLM Data2VecTextForCausalLM "
    "ElectraForCausalLM ErnieForCausalLM MegatronBertForCausalLM RemBertForCausalLM RoCBertForCausalLM "
    "RoFormerForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM XLMRobertaForCausalLM "
    "XLMRobertaXLForCausalLM XmodForCausalLM"
).split()
