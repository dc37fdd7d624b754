"""Token merging: patches that say much the same become one token, without training.

Behind the attention of a block, patches stand alternately in two sets. Each of the first is matched to the most
similar of the second, and the ``r`` best pairs become one token each: the mean, weighted by how many patches a token
stands for. Later attention counts a token as often as that. Class token, distillation token and registers never merge.

Letters: B images, N tokens, M tokens that are left, P patches, D embedding width,
h heads, d width of a head's keys, F of all heads'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.attention import QK, VO, SplitAttention, split_attention, why_not
from vitprune.views import has_classifier, num_patches, num_prefix_tokens, num_tokens_read

# Keys that are shorter than this are like no other.
LEAST = 1e-12


@dataclass(frozen=True)
class Matching:
    """Which tokens become one.

    Attributes:
        place_BN: token -> its place among the tokens that are left (int64).
        num_left: M.
    """

    place_BN: Tensor
    num_left: int


def match_tokens(keys_BhNd: Tensor, r: int, num_prefix: int) -> Matching:
    """Match tokens that are alike, so that ``r`` of them disappear.

    Args:
        keys_BhNd: of attention; no gradient flows through them. Tokens are alike whose keys are, by the mean of the
            cosines of all heads.
        r: how many; at most half of the patches.
        num_prefix: tokens at the front that never merge, and keep their places.

    Raises:
        VitpruneError: if there are fewer than 2r patches.

    >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 1.0]])
    >>> match_tokens(keys[None, None], r=1, num_prefix=0).place_BN
    tensor([[0, 1, 1, 2]])

    Source:
        Bolya et al., ICLR 2023 (arXiv:2210.09461). They take the cosine of the mean over heads, and have tokens that
        are left change places; here these keep their order.
    """
    num_tokens = keys_BhNd.shape[2]
    check_r(r, num_tokens - num_prefix)
    keys_BNhd = keys_BhNd.detach().transpose(1, 2)
    # Not ``normalize``, whose graph spreads the lengths out over all dimensions first.
    keys_BNF = (keys_BNhd / keys_BNhd.norm(dim=-1, keepdim=True).clamp_min(LEAST)).flatten(2)
    first, second = keys_BNF[:, num_prefix::2], keys_BNF[:, num_prefix + 1 :: 2]
    similarity, partner = (first @ second.transpose(1, 2)).max(dim=-1)
    gone_Br = similarity.topk(r, dim=-1, sorted=False).indices
    partner_Br = num_prefix + 1 + 2 * partner.gather(1, gone_Br)
    index_N = torch.arange(num_tokens, device=keys_BNF.device)
    into_BN = index_N.expand(keys_BNF.shape[0], -1).scatter(1, num_prefix + 2 * gone_Br, partner_Br)
    place_BN = (into_BN == index_N).cumsum(dim=1) - 1
    return Matching(place_BN.gather(1, into_BN), num_tokens - r)


def check_r(r: int, num_patches: int) -> None:
    """Refuse to merge more tokens at once than can."""
    if not 0 <= r <= num_patches // 2:
        raise VitpruneError(f"{r} of {num_patches} patches cannot merge at once, at most {num_patches // 2} can")


def merge_with(matching: Matching, x_BND: Tensor, size_BN1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that are left [B, M, D], means weighted by size, and their sizes [B, M, 1].

    Linear in ``x_BND``. A token that nothing merges with stays exactly as it is.

    >>> matching = Matching(torch.tensor([[0, 1, 1]]), num_left=2)
    >>> x, size = merge_with(matching, torch.tensor([[[5.0], [1.0], [4.0]]]), torch.tensor([[[1.0], [2.0], [1.0]]]))
    >>> x.flatten().tolist(), size.flatten().tolist()
    ([5.0, 2.0], [1.0, 3.0])
    """
    # A product with zeros and ones: runtimes do these fast, and gathering and scattering slowly.
    place_BM1 = torch.arange(matching.num_left, device=x_BND.device)[:, None]
    joined_BMN = (matching.place_BN[:, None, :] == place_BM1).to(x_BND.dtype)
    merged_size_BM1 = joined_BMN @ size_BN1
    return joined_BMN @ (x_BND * size_BN1) / merged_size_BM1, merged_size_BM1


def follow(matching: Matching, source_BN: Tensor | None) -> Tensor:
    """Return where each token of the unmerged sequence is after one more merge.

    Args:
        matching: of the merge.
        source_BN: where it was before (int64); None before the first merge.

    >>> follow(Matching(torch.tensor([[0, 1, 1]]), num_left=2), torch.tensor([[0, 1, 2, 2]]))
    tensor([[0, 1, 1, 1]])
    """
    return matching.place_BN if source_BN is None else matching.place_BN.gather(1, source_BN)


def pool(source_BN: Tensor, x_BND: Tensor, num_left: int) -> Tensor:
    """Return the mean of the unmerged tokens that each merged token stands for [B, M, D].

    Args:
        source_BN: where each unmerged token is, as ``follow`` gives it.
        x_BND: unmerged tokens.
        num_left: M.

    >>> pool(torch.tensor([[0, 1, 1]]), torch.tensor([[[5.0], [1.0], [4.0]]]), num_left=2).flatten().tolist()
    [5.0, 2.5]
    """
    return merge_with(Matching(source_BN, num_left), x_BND, torch.ones_like(x_BND[..., :1]))[0]


_CHAINED = (
    "blocks of a model whose tokens merge hand each other sizes as well: gradient checkpointing and intermediate "
    "features are for the model before set_merging"
)


class Merge(nn.Module):
    """The merge of one block; has no weights.

    Attributes:
        r: how many tokens disappear.
        num_prefix: tokens at the front that never merge.
    """

    def __init__(self, r: int, num_prefix: int) -> None:
        super().__init__()
        self.r, self.num_prefix = r, num_prefix

    def forward(self, x_BND: Tensor, size_BN1: Tensor, keys_BhNd: Tensor) -> tuple[Tensor, Tensor, Matching]:
        """Return what is left of the tokens [B, M, D], their sizes [B, M, 1], and which of them became one."""
        matching = match_tokens(keys_BhNd, self.r, self.num_prefix)
        return *merge_with(matching, x_BND, size_BN1), matching

    def extra_repr(self) -> str:
        """Say in a printed model how many disappear."""
        return f"r={self.r}, num_prefix={self.num_prefix}"


class MergingBlock(nn.Module):
    """A block of timm's whose tokens know how many patches they stand for, and may merge between attention and FFN.

    Children are named as in timm's ``Block``, so a state dict does too.

    Attributes:
        merge: None where no token merges.
    """

    def __init__(self, block: nn.Module, r: int, num_prefix: int) -> None:
        super().__init__()
        for name, child in block.named_children():
            if name == "norm2":
                self.merge = Merge(r, num_prefix) if r else None
            if name != "merge":
                self.add_module(name, child)
        self.training = block.training

    def forward(self, x_BND: Tensor, size_BN1: Tensor | None = None) -> tuple[Tensor, Tensor | None, Matching | None]:
        """Return tokens [B, M, D], their sizes [B, M, 1], and which became one.

        Args:
            x_BND: tokens.
            size_BN1: how many patches each stands for; None where nothing has merged yet.

        Raises:
            VitpruneError: if blocks are chained by others than ``MergingBlocks``.
        """
        if not isinstance(x_BND, Tensor):
            raise VitpruneError(_CHAINED)
        # A token of size n counts as n equal ones would.
        mask = None if size_BN1 is None else size_BN1.log().transpose(1, 2).unsqueeze(1)
        z_BND, keys, matching = self.norm1(x_BND), None, None
        if self.merge is None:
            y_BND = self.attn(z_BND, attn_mask=mask, is_causal=False)
        else:
            y_BND, keys = self.attn.attend(z_BND, z_BND, mask)
        x_BND = x_BND + self.drop_path1(self.ls1(y_BND))
        if self.merge is not None:
            size_BN1 = torch.ones_like(x_BND[..., :1]) if size_BN1 is None else size_BN1
            x_BND, size_BN1, matching = self.merge(x_BND, size_BN1, keys)
        x_BND = x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND))))
        return x_BND, size_BN1, matching


class MergingBlocks(nn.Sequential):
    """Blocks that hand each other tokens and their sizes.

    Attributes:
        unmerges: whether every patch is given the state of its token at the end, for a head that reads them all: what
            it makes of them then weighs each token by its size.
    """

    def __init__(self, blocks: Sequence[nn.Module], unmerges: bool) -> None:
        super().__init__(*blocks)
        self.unmerges = unmerges

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return one block; some of them by themselves are refused."""
        if isinstance(index, slice):
            raise VitpruneError(_CHAINED)
        return super().__getitem__(index)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return the last block's output: of the tokens that are left [B, M, D], or of all of them [B, N, D]."""
        size_BM1, source_BN = None, None
        for block in self:
            if isinstance(block, MergingBlock):
                x_BND, size_BM1, matching = block(x_BND, size_BM1)
                if self.unmerges and matching is not None:
                    source_BN = follow(matching, source_BN)
            else:
                x_BND = block(x_BND)
        if source_BN is None:
            return x_BND
        return x_BND.gather(1, source_BN.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


@entry
def set_merging(model: nn.Module, schedule: Sequence[int]) -> nn.Module:
    """Return a copy in which tokens merge; no training needed.

    Blocks before the first that merges stay as they are; from there on attention is ``SplitAttention``.

    Args:
        model: timm Vision Transformer, as ``check_merging`` admits it; it may merge already.
        schedule: how many tokens disappear in each block; zeros alone give the model without merging.

    Raises:
        VitpruneError: if the model cannot merge tokens, the schedule is not as long as it has blocks, or more than
            half of the patches of a block are to go at once.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
    >>> describe_merging(set_merging(model, (0, 60, 0)))
    [0, 60, 0]
    """
    check_merging(model)
    check_schedule(model, schedule)
    first = next((index for index, r in enumerate(schedule) if r), len(schedule))
    attentions = {f"blocks.{index}.attn": block.attn for index, block in enumerate(model.blocks) if index >= first}
    result = split_attention(model, [name for name, module in attentions.items() if type(module) is Attention])
    num_prefix = num_prefix_tokens(model)
    blocks = [
        _plain(block) if index < first else MergingBlock(block, r, num_prefix)
        for index, (block, r) in enumerate(zip(result.blocks, schedule, strict=True))
    ]
    if first < len(schedule):
        result.blocks = MergingBlocks(blocks, unmerges=num_tokens_read(model) is None)
    elif isinstance(model.blocks, MergingBlocks):
        result.blocks = nn.Sequential(*blocks)
    result.blocks.train(model.blocks.training)
    return result


def _plain(block: nn.Module) -> nn.Module:
    """Return timm's own block of the same children."""
    if type(block) is Block:
        return block
    result = Block(dim=1, num_heads=1)
    for name, child in block.named_children():
        if name != "merge":
            setattr(result, name, child)
    return result


def unmerged(model: nn.Module) -> nn.Module:
    """Return a model whose tokens do not merge: the model itself where they do not anyway.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
    >>> unmerged(model) is model, describe_merging(unmerged(set_merging(model, (0, 60, 0))))
    (True, None)
    """
    merge = describe_merging(model)
    return model if merge is None else set_merging(model, [0] * len(merge))


def drop_unread_merge(model: nn.Module) -> None:
    """Take from a model, in place, the merge of its last block where the head reads none of the tokens that merge.

    >>> import timm
    >>> model = set_merging(timm.create_model("vit_tiny_patch16_224", depth=2), (60, 20))
    >>> drop_unread_merge(model)
    >>> describe_merging(model)
    [60, 0]
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, MergingBlocks) and not blocks.unmerges and isinstance(blocks[-1], MergingBlock):
        blocks[-1].merge = None


def describe_merging(model: nn.Module) -> list[int] | None:
    """Return how many tokens disappear in each block of a model; None where none do.

    >>> import timm
    >>> describe_merging(timm.create_model("vit_tiny_patch16_224", depth=1)) is None
    True
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, MergingBlocks):
        return None
    merges = [getattr(block, "merge", None) for block in blocks]
    return [0 if merge is None else merge.r for merge in merges]


def check_schedule(model: nn.Module, schedule: Sequence[int]) -> None:
    """Refuse a schedule that does not fit a model, naming the block.

    Raises:
        VitpruneError: as in ``set_merging``.
    """
    if len(schedule) != len(model.blocks):
        raise VitpruneError(f"the model has {len(model.blocks)} blocks, the schedule is for {len(schedule)}")
    left = num_patches(model)
    for index, r in enumerate(schedule):
        try:
            check_r(r, left)
        except VitpruneError as error:
            raise VitpruneError(f"blocks.{index}: {error}") from None
        if r and type(model.blocks[index].attn) not in (Attention, SplitAttention):
            raise VitpruneError(f"blocks.{index}: no token can merge where attention is left out, it has no keys")
        left -= r


def check_merging(model: nn.Module) -> None:
    """Refuse a model whose tokens cannot merge.

    Raises:
        VitpruneError: with the reason.

    >>> import timm
    >>> check_merging(timm.create_model("vit_tiny_patch16_224", depth=1))
    """
    reason = why_no_merging(model)
    if reason:
        raise VitpruneError(f"{type(model).__name__} cannot merge tokens: {reason}")


def why_no_merging(model: nn.Module) -> str | None:
    """Say why a model's tokens cannot merge; None where they can.

    >>> import timm
    >>> why_no_merging(timm.create_model("beit_base_patch16_224", depth=1))
    'it adds a position bias between tokens to its attention'
    """
    reason = _REASONS.get(type(model).__name__)
    if reason:
        return reason
    # Exactly timm's: another one may hand its blocks more than tokens, or look at them in between.
    if getattr(type(model), "forward_features", None) is not VisionTransformer.forward_features:
        return "its blocks are not run as those of timm's VisionTransformer are"
    if getattr(model, "global_pool", None) == "" and not has_classifier(model):
        return "it answers every token, and merged ones would be missing (global_pool='')"
    for index, block in enumerate(model.blocks):
        if type(block) not in (Block, MergingBlock):
            return f"blocks.{index} is a {type(block).__name__}, not timm's Block"
        # What has no heads stands where attention was left out.
        reason = why_not(block.attn, QK) or why_not(block.attn, VO) if hasattr(block.attn, "num_heads") else None
        if reason:
            return f"blocks.{index}.attn: {reason}"
    return None


_POSITION_BIAS = "it adds a position bias between tokens to its attention"
_ROTARY = "it turns queries and keys by where tokens are, and a merged token is in several places"
_WINDOWS = "it attends within windows, which a missing token would break"
_REASONS: Mapping[str, str] = {
    "Beit": _POSITION_BIAS,
    "VisionTransformerRelPos": _POSITION_BIAS,
    "VisionTransformerSAM": _POSITION_BIAS,
    "Eva": _ROTARY,
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "Cait": "its attention mixes heads, and its class token is asked at the end",
    "Xcit": "it attends to channels, and its convolutions want a grid of patches",
}
