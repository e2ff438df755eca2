"""The reference networks: a second sample given beside the state, and the parts that they share."""

import pytest
import torch

from fewstep.models.networks import build_network, describe_network
from fewstep.networks import MLP, UNet, UNet3d
from fewstep.networks.parts import Dropout, GroupNorm, Modulation, PositionalEmbedding
from fewstep.networks.transformer import Block, Offsets
from fewstep.networks.unet import folded, unfolded
from fewstep.randomness import Rng
from fewstep.tangents import finite_difference, tangent

MAKE = {
    "mlp on pictures": lambda beside: MLP((1, 4, 4), width=16, blocks=1, beside=beside),
    "mlp on vectors": lambda beside: MLP((3,), width=16, blocks=1, beside=beside),
    "unet": lambda beside: UNet((1, 8, 8), channels=(8, 16), blocks=1, width=16, beside=beside),
    "unet3d": lambda beside: UNet3d((1, 4, 8, 4), channels=(8, 16), blocks=1, width=16, beside=beside),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_second_sample_starts_without_effect_and_then_has_one(name):
    """With its weights at zero the network is the one without; None stands for zeros; moved weights show."""
    torch.manual_seed(0)
    net = MAKE[name](2)
    for parameter in net.leave.parameters():
        torch.nn.init.normal_(parameter)
    x, t = torch.randn(5, *net.shape), torch.rand(5)
    second = torch.randn(5, 2, *net.shape[1:])
    plain = net(x, t)
    assert torch.equal(net(x, t, beside=second), plain)
    torch.nn.init.normal_(net.beside.layer.weight)
    assert torch.equal(net(x, t, beside=torch.zeros_like(second)), net(x, t))
    assert not torch.allclose(net(x, t, beside=second), plain)


@pytest.mark.parametrize("name", MAKE)
def test_a_second_sample_that_was_not_asked_for_is_refused(name):
    """One line that names the argument."""
    net = MAKE[name](0)
    with pytest.raises(ValueError, match="beside=channels"):
        net(torch.zeros(1, *net.shape), torch.ones(1), beside=torch.zeros(1, 1, *net.shape[1:]))
    with pytest.raises(ValueError, match="beside=-1"):
        MLP((3,), beside=-1)


def test_group_norm_in_half_precision_is_that_of_float32_rounded():
    """Under autocast and with weights in bfloat16, channels-last or not."""
    torch.manual_seed(0)
    for kind in (torch.bfloat16, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            norm = GroupNorm(4, 8)
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
            x = (3 + torch.randn(5, 8, 6, 6)).to(kind).to(memory_format=layout)
            expected = norm(x.float()).to(kind)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(norm(x), expected)
            norm.weight.data, norm.bias.data = norm.weight.data.to(kind), norm.bias.data.to(kind)
            rounded = GroupNorm(4, 8)
            rounded.load_state_dict({name: p.float() for name, p in norm.state_dict().items()})
            assert torch.equal(norm(x), rounded(x.float()).to(kind))


def test_modulation_by_hand():
    """``x (1 + scale) + shift`` at every place; with double norm both have a root mean square of 1, but for eps."""
    torch.manual_seed(0)
    x, emb = torch.randn(4, 6, 3, 2, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    for double in (False, True):
        layer = Modulation(5, 6, double).double()
        assert torch.equal(layer(x, emb), x)
        torch.nn.init.normal_(layer.projection.weight)
        scale, shift = layer.projection(emb).split(6, 1)
        if double:
            scale, shift = (v / (v.square().sum(1, keepdim=True) / 6 + 1e-4).sqrt() for v in (scale, shift))
        expected = torch.einsum("bc,bchw->bchw", 1 + scale, x) + shift[:, :, None, None]
        torch.testing.assert_close(layer(x, emb), expected, rtol=1e-12, atol=1e-12)


def test_times_are_embedded_in_geometric_frequencies():
    """From 0.25 to 16 in equal ratios, cosines before sines."""
    t = torch.tensor([0.0, 0.3, -2.0], dtype=torch.float64)
    angle = t[:, None] * torch.tensor([0.25, 1.0, 4.0, 16.0], dtype=torch.float64)
    torch.testing.assert_close(PositionalEmbedding(8)(t), torch.cat([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-5)
    for width in (0, 1, 7):
        with pytest.raises(ValueError, match=f"width={width} must be an even number"):
            PositionalEmbedding(width)
    assert PositionalEmbedding(2)(t).shape == (3, 2)


def test_dropout_keeps_the_mean():
    """What is kept is divided by the share that is; nothing is kept at p = 1, and everything outside training."""
    torch.manual_seed(0)
    x = torch.full((100, 100), 3.0)
    found = Dropout(0.25)(x)
    kept = found != 0
    assert torch.equal(found[kept], (x / 0.75)[kept]) and abs(float(kept.double().mean()) - 0.75) < 0.02
    assert not bool(Dropout(1.0)(x).any()) and torch.equal(Dropout(0.25).eval()(x), x)


def test_a_block_is_attention_and_two_layers():
    """Against PyTorch's attention with the offsets as a bias, at weights away from their start."""
    torch.manual_seed(0)
    block = Block(5, 8, 2, 0.0).double()
    torch.nn.init.normal_(block.modulation.weight)
    x, emb = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    scale, shift, mlp_scale, mlp_shift = block.modulation(emb).unflatten(1, (4, 1, 8)).unbind(1)

    def norm(x):
        return torch.nn.functional.layer_norm(x, (8,))

    inner = block.qkv(norm(x) * (1 + scale) + shift).unflatten(2, (3, 2, 4))
    q, k, v = inner.permute(2, 0, 3, 1, 4)
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=block.offsets())
    x1 = x + block.mix(seen.transpose(1, 2).reshape(3, 5, 8))
    hidden = block.first(norm(x1) * (1 + mlp_scale) + mlp_shift)
    torch.testing.assert_close(block(x, emb), x1 + block.second(hidden * hidden.sigmoid()), rtol=1e-12, atol=1e-12)


def test_offsets_start_at_a_neighbour():
    """Head h prefers the token ``1 + h // 2`` places to the right, or to the left where h is odd; the bias falls with
    the logarithm of the distance from there."""
    found = Offsets(6, 4)()
    for head, favourite in enumerate((1, -1, 2, -2)):
        away = torch.tensor([[abs(j - i - favourite) for j in range(6)] for i in range(6)])
        torch.testing.assert_close(found[head], -2 * torch.log1p(away.float()))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_one_sample_is_the_first_of_two_down_to_one_place(kind: torch.dtype) -> None:
    """A bottleneck of one place has one value in each group: a batch of one goes through it as a batch of two does."""
    net = UNet((1, 4, 4), (8, 8), 1, 16, None).to(kind)
    x, t = Rng(0).normal(2, 1, 4, 4).to(kind), torch.full((2,), 0.5)
    torch.testing.assert_close(net(x[:1], t[:1]), net(x, t)[:1], rtol=1e-2, atol=1e-3)


def moved_unet3d(dtype: torch.dtype) -> UNet3d:
    torch.manual_seed(1)
    net = UNet3d((2, 4, 8, 4), (8, 16), 1, 16, 3, ("s",)).to(dtype)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


def test_patches_of_voxels_are_channels_and_back():
    """A patch of 2x2x2 is eight channels in place order; pictures as PyTorch has it."""
    x = torch.arange(2 * 3 * 4 * 6 * 8.0).reshape(2, 3, 4, 6, 8)
    patches = folded(x)
    assert patches.shape == (2, 24, 2, 3, 4)
    assert torch.equal(patches[1, 8:16, 1, 2, 3], x[1, 1, 2:4, 4:6, 6:8].flatten())
    assert torch.equal(unfolded(patches), x)
    assert torch.equal(folded(x[:, :, 0]), torch.nn.functional.pixel_unshuffle(x[:, :, 0], 2))


def test_a_flat_unet3d_is_the_unet():
    """On voxels that are alike along one side, with kernels that look at the middle there only, patches included."""
    torch.manual_seed(0)
    flat, deep = UNet((1, 8, 8), (8,), 1, 16, 3), UNet3d((1, 8, 8, 8), (8,), 1, 16, 3)
    for p in flat.parameters():
        p.data += 0.1 * torch.randn_like(p)
    weights = deep.state_dict()
    for name, value in flat.state_dict().items():
        if value.ndim == 4 and value.shape[-1] == 3:
            wide = torch.zeros(*value.shape[:2], 3, 3, 3)
            wide[:, :, 1] = value
            value = wide
        elif value.ndim == 4:
            value = value[:, :, None]
        if name == "enter.weight":
            value = torch.cat([value, torch.zeros_like(value)], 1)  # the first of two layers of a patch
        if name.startswith("leave."):
            value = torch.cat([value, value])
        assert weights[name].shape == value.shape
        weights[name] = value
    deep.load_state_dict(weights)
    x, t, cond = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4) % 3
    x3 = x[:, :, None].expand(-1, -1, 8, -1, -1).contiguous()
    with torch.no_grad():
        torch.testing.assert_close(deep(x3, t, cond)[:, :, 3], flat(x, t, cond), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(deep(x3.flip(4), t, cond)[:, :, 3], flat(x, t, cond), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_unet3d_has_a_forward_mode_derivative(dtype: torch.dtype) -> None:
    net, exact = moved_unet3d(dtype), moved_unet3d(torch.float64)
    exact.load_state_dict({name: p.double() for name, p in net.state_dict().items()})
    x = torch.randn(3, *net.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=dtype)
    cond = torch.arange(3)
    value, slope = tangent(lambda y, s: net(y, s, cond, s=s), x, t, torch.ones_like(x), torch.ones_like(t))
    plain, difference = finite_difference(
        lambda y, s: exact(y, s, cond, s=s), x.double(), t.double(), torch.ones_like(x.double()),
        torch.ones_like(t.double()), step=1e-5,
    )  # fmt: skip
    tolerance = 1e-6 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(value.double(), plain, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(slope.double(), difference, atol=tolerance, rtol=tolerance)


def test_the_unet3d_is_described_and_built_again():
    net = moved_unet3d(torch.float32)
    again = build_network(describe_network(net))
    again.load_state_dict(net.state_dict())
    x, t, cond = torch.randn(2, *net.shape), torch.rand(2), torch.tensor([0, -1])
    assert torch.equal(again(x, t, cond, s=t), net(x, t, cond, s=t))
    assert net.features(x, t, cond, s=t).shape[1:] == net.feature_shape == (16, 1, 2, 1)


def test_samples_of_another_kind_are_refused_by_name():
    with pytest.raises(ValueError, match=r"UNet3d: samples of shape \[1, 8, 8\] are not voxels \[C, D, H, W\]"):
        UNet3d((1, 8, 8))
    with pytest.raises(ValueError, match=r"UNet: samples of shape \[1, 8, 8, 8\] are not pictures \[C, H, W\]"):
        UNet((1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"UNet3d: a grid of 12x6x12 does not divide into 2 levels \(4\)"):
        UNet3d((1, 12, 6, 12))
