"""The seam: the one folder that knows the insides of transformers; tests/hf guards what it relies on.

What it relies on (checked on 5.23):
- ``AttentionInterface.register`` and ``AttentionMaskInterface.register``; ``model.set_attn_implementation(name)``.
- A layer calls ``cache.update(k, v, layer_idx)`` and hands the returned key tensor to the attention function: an
  attribute set on that tensor arrives there. Nothing global, no hooks, no patched classes.
- The mask made by the registered mask function arrives unchanged, and so does an attribute set on it.
- Attention layers pass ``position_ids`` on to the attention function.
- A model file defines ``apply_rotary_pos_emb`` and ``eager_attention_forward``; the text model has ``rotary_emb``.
"""
