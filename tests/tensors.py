"""What tests share: bits of tensors, values that meet the edges of a type, layouts, threads."""

import contextlib

import torch

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INF, NAN = float("inf"), float("nan")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(t):
    return t.contiguous().view(BITS[t.element_size()])


def same(a, b):
    """Equal types, shapes and bits, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_bits(got, expected, what):
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    differ = (bits(got) != bits(expected)).nonzero()
    assert len(differ) == 0, (
        f"{what}: {len(differ)} of {got.numel()} differ, first {differ[0].tolist()}"
    )


def with_payloads(generator, t):
    """The NaN of a tensor with bits of all kinds: both signs, any mantissa but that of infinity."""
    infinity = bits(torch.tensor(INF, dtype=torch.float64).to(t.dtype))
    mantissa = 2 ** {8: 52, 4: 23, 2: 10 if t.dtype == torch.float16 else 7}[t.element_size()]
    payload = torch.randint(1, mantissa, t.shape, generator=generator)
    sign = -torch.randint(0, 2, t.shape, generator=generator) << (8 * t.element_size() - 1)
    nan = (infinity.long() + payload | sign).to(infinity.dtype)
    return torch.where(t.isnan(), nan, bits(t)).view(t.dtype)


def values(generator, shape, dtype, kind):
    """Numbers of a kind; of the integers there are but two: "lowest" and small ones with ties.

    normal   no ties, nothing special
    tiny     subnormals, underflow, signed zeros
    wild     now and then infinite, NaN or -0
    spots    such a number in a few places, often the first or the last
    ties     small integers, and among them the special ones of all kinds
    lowest   -inf, the number that stands for a tap that is not there
    """
    if not dtype.is_floating_point:
        low, high = (0, 2) if dtype == torch.bool else (0, 5) if dtype == torch.uint8 else (-2, 3)
        t = torch.randint(low, high, shape, generator=generator).to(dtype)
        if kind != "lowest":
            return t
        return t.fill_(0 if dtype == torch.bool else torch.iinfo(dtype).min)
    if kind == "lowest":
        return torch.full(shape, -INF, dtype=dtype)
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    pick = torch.rand(shape, generator=generator)
    special = torch.tensor([INF, -INF, NAN, -0.0], dtype=torch.float64)
    if kind == "tiny":
        info = torch.finfo(dtype)
        t = torch.where(pick < 0.3, t * info.tiny * 0.3, t)
        t = torch.where(pick > 0.6, t * info.tiny**0.5, t)
        t = torch.where((pick > 0.3) & (pick < 0.4), t * 0.0, t)
    if kind == "wild":
        t = torch.where(pick < 0.01, special[(pick * 400).long().clamp(max=3)], t)
    if kind == "spots" and t.numel():
        few = torch.randint(0, t.numel(), (3,), generator=generator)
        few[:2] = torch.tensor([0, t.numel() - 1])
        few = few[torch.randint(0, 3, (2,), generator=generator)]
        t.view(-1)[few] = special[torch.randint(0, 4, (2,), generator=generator)]
    if kind == "ties":
        special = torch.cat([special, torch.tensor([1e-40, -INF], dtype=torch.float64)])
        whole = torch.randint(-2, 3, shape, generator=generator).double()
        t = torch.where(pick < 0.3, special[(pick * 20).long().clamp(max=5)], whole)
    return t.to(dtype) if kind == "normal" else with_payloads(generator, t.to(dtype))


LAYOUTS = ["contiguous", "channels_last", "transposed", "gaps"]


def in_layout(t, layout):
    """The same values in another place of memory, with the strides of a layout exactly."""
    if layout == "channels_last":  # of three axes too: then the channels are innermost
        return t.new_empty(t.movedim(1, -1).shape).movedim(-1, 1).copy_(t)
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "gaps":
        wide = t.new_empty([*t.shape[:-1], 2 * t.shape[-1] + 1])
        wide[..., 1::2] = t
        return wide[..., 1::2]
    return t.contiguous()


def spoil_memory(like):
    """Memory that was freed last is given out first: what a call then leaves unwritten shows."""
    size = like.numel() * like.element_size()
    blocks = [torch.full((size,), 0x5A, dtype=torch.uint8) for _ in range(4)]
    del blocks
