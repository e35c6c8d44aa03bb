"""Channels are ranked by the mean of |q_i * k_i| over all tokens, of each token's own rotated query and key."""

import pytest
import tiny
import torch
from torch import Tensor

from kvote import InputError
from kvote.calibration.channels import ChannelProducts, order_of
from kvote.calibration.measure import LEAST, blocks_of, measure_channels
from kvote.read.reader import Activity, Reading
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries


def rotated(net, block: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer the rotated queries and keys [1, heads, t, d], straight from the weights of a Llama."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found = []

    def note(module, args, kwargs):
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        query, key = (p(hidden).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        found.append(apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"]))

    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in net.model.layers]
    with torch.no_grad():
        net(input_ids=block)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("gqa", [1, 4])
def test_the_order_is_that_of_the_mean_product_over_all_texts(gqa):
    net = tiny.model(hidden_size=32 * gqa, head_dim=16, num_attention_heads=2 * gqa, num_key_value_heads=2)
    blocks = [tiny.ids(1, 40, seed=1), tiny.ids(2, 23, seed=2), tiny.ids(1, LEAST, seed=3)]
    sums = [torch.zeros(2, 16, dtype=torch.float64) for _ in range(2)]
    for block in blocks:
        for layer, (query, key) in enumerate(rotated(net, block)):
            for head in range(2 * gqa):
                product = (query[:, head] * key[:, head // gqa]).abs().double()
                sums[layer][head // gqa] += product.sum(dim=(0, 1))
    made = measure_channels(net, blocks)
    order = order_of(made)
    assert made.data["tokens"] == 40 + 46 + LEAST
    for layer in range(2):
        assert torch.equal(torch.tensor(order[layer]), sums[layer].argsort(dim=1, descending=True))
    # The last text alone ranks otherwise: all of them count.
    assert order_of(measure_channels(net, blocks[-1:]))[0] != order[0]


def test_texts_count_whatever_their_order():
    net = tiny.model()
    blocks = [tiny.ids(1, 40, seed=1), tiny.ids(1, 24, seed=2)]
    assert measure_channels(net, blocks).data == measure_channels(net, blocks[::-1]).data


def test_planted_channels_are_found():
    torch.manual_seed(3)
    query, key = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16)
    key[:, 0, :, [5, 11]] *= 20
    query[:, 2:, :, 3] *= 20
    segment = UncompressedSegment(2, key, 16, None)
    segment.add_sequences(1)
    segment.append([0], key, key, torch.arange(50)[None])
    reader = ChannelProducts()
    reading = Reading(Queries(query), segment, [0], 0, 0, False, 7, 1, None, Activity())
    list(reader.read(reading))
    order = torch.tensor(reader.data(50)["layers"]["7"])
    assert set(order[0, :2].tolist()) == {5, 11}
    assert order[1, 0] == 3


def test_a_text_is_cut_into_blocks_and_all_of_it_counts():
    blocks = blocks_of(torch.arange(1100), 512)
    assert [tuple(block.shape) for block in blocks] == [(1, 512), (1, 512), (1, 76)]
    assert torch.equal(torch.cat(blocks, dim=1)[0], torch.arange(1100))
    assert [b.shape[1] for b in blocks_of(torch.arange(512), 512)] == [512]


@pytest.mark.parametrize("count", [0, 1, LEAST - 1])
def test_too_little_to_measure_with_is_refused(count):
    with pytest.raises(InputError, match=rf"needs at least 64 tokens of text; there (is|are) {count}\."):
        measure_channels(tiny.model(), blocks_of(torch.arange(count)))


def test_layers_that_are_not_managed_are_left_out():
    made = measure_channels(tiny.model("gemma3"), [tiny.ids(1, LEAST)])
    assert list(made.data["layers"]) == ["1"]
