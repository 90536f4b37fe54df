"""Vision transformer for clips: encoder, V-JEPA predictor, VideoMAE pixel decoder.

The blocks are timm's; this file adds what a *video* model needs: tubelet embedding of the kept tokens only,
fixed positions on a (t, y, x) grid, and attention that ignores padding. Parameter names follow the published
V-JEPA and VideoMAE checkpoints, so that `weights` can load them key by key.
"""

from __future__ import annotations

import math

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int, int]  # tokens along (t, y, x)

# cuDNN's attention plans every new shape, which takes the host tens of milliseconds, and here the number of tokens
# changes from step to step. Flash and memory-efficient attention take any shape.
torch.backends.cuda.enable_cudnn_sdp(False)


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, N, D] (or [1, N, D]) at index [B, K] -> [B, K, D]."""
    return tokens.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def patchify(clips: Tensor, tubelet: Grid) -> Tensor:
    """Clips [B, C, T, H, W] -> tubelets [B, t·y·x, C, pt, ph, pw], in (t, y, x) order."""
    B, C, T, H, W = clips.shape
    t, p, q = tubelet
    if T % t or H % p or W % q:
        raise ValueError(f"a clip of {T}×{H}×{W} does not divide into tubelets of {t}×{p}×{q}: "
                         "change frames, size or patch")
    x = clips.reshape(B, C, T // t, t, H // p, p, W // q, q)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C, t, p, q)


def sincos(position: Tensor, width: int) -> Tensor:
    """Sines then cosines of positions [N] at width/2 geometric frequencies -> [N, width]."""
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = position.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos3d(grid: Grid, width: int) -> Tensor:
    """V-JEPA's table: t, y and x get the same share of the width ("uniform power"). -> [1, t·y·x, width]."""
    share = 2 * math.ceil(width / 6)
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return torch.cat([sincos(a.flatten(), share) for a in axes], 1)[None, :, :width].float()


def sincos1d(grid: Grid, width: int) -> Tensor:
    """VideoMAE's table: tokens numbered 0…N-1, sine and cosine interleaved. -> [1, t·y·x, width]."""
    table = sincos(torch.arange(math.prod(grid)), width)
    return table.view(-1, 2, width // 2).transpose(1, 2).reshape(1, -1, width).float()


POSITIONS = {"sincos3d": sincos3d, "sincos1d": sincos1d}


def make_blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    """Pre-norm blocks, initialised as published: residual branches of layer l are divided by sqrt(2·l)."""
    norm = lambda d, **kw: nn.LayerNorm(d, eps=1e-6, **kw)  # noqa: E731
    blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
    with torch.no_grad():
        blocks.apply(lambda module: init_linear(module, width))
        for layer, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
    return blocks


def init_linear(module: nn.Module, width: int) -> None:
    """Truncated normal of 0.02 for a model 1024 wide, as published; narrower models get the same *gain*.

    At 128 features 0.02 would leave every branch, and the patch content against the position added to it, a third
    as strong as in ViT-L: a small random encoder would then see little but position.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02 * math.sqrt(1024 / width))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def attention_mask(valid: Tensor | None) -> Tensor | None:
    """Padding flags [B, K] (True = a real token) -> [B, 1, 1, K], read as 'every query may look at these keys'.

    Flags that say so for each query, [B, K, K], become [B, 1, K, K].
    """
    return None if valid is None else valid[:, None, None] if valid.ndim == 2 else valid[:, None]


class TubeletEmbedding(nn.Module):
    """Conv3d with kernel = stride = tubelet, computed as one matrix product over the kept tokens only."""

    def __init__(self, tubelet: Grid, channels: int, width: int):
        super().__init__()
        self.tubelet = tubelet
        self.proj = nn.Conv3d(channels, width, tubelet, tubelet)  # holds the weights, under their published name
        # 0.02 for the 3·2·16·16 inputs of the published models, the same gain for others
        nn.init.trunc_normal_(self.proj.weight, std=0.02 * math.sqrt(1536 / self.proj.weight[0].numel()))
        nn.init.zeros_(self.proj.bias)

    def forward(self, clips: Tensor, keep: Tensor | None) -> Tensor:
        patches = patchify(clips, self.tubelet).flatten(2)
        patches = patches if keep is None else gather(patches, keep)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """E_theta: clips [B, C, T, H, W] and the tokens to keep [B, K] -> features [B, K, D].

    Args:
        grid: tokens along (t, y, x).
        tubelet: pixels of one token along (t, y, x).
        positions: "sincos3d" (V-JEPA) or "sincos1d" (VideoMAE).
    """

    def __init__(self, grid: Grid, tubelet: Grid, width: int, depth: int, heads: int, channels: int = 1,
                 positions: str = "sincos3d"):
        super().__init__()
        self.grid, self.tubelet, self.width, self.heads, self.channels = grid, tubelet, width, heads, channels
        self.positions = positions
        self.patch_embed = TubeletEmbedding(tubelet, channels, width)
        self.register_buffer("pos_embed", POSITIONS[positions](grid, width), persistent=False)
        self.blocks = make_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, clips: Tensor, keep: Tensor | None = None, valid: Tensor | None = None,
                layers: bool = False, placed: bool = True) -> Tensor | list[Tensor]:
        """`valid` [B, K] marks padding, or [B, K, K] who may look at whom; `layers` returns the output of every block
        (before the last norm). Tokens that are not `placed` are given no position."""
        grid = tuple(n // size for n, size in zip(clips.shape[2:], self.tubelet, strict=True))
        if grid != tuple(self.grid):
            raise ValueError(f"clips of {'×'.join(map(str, clips.shape[2:]))} give {grid} tokens, but this encoder has "
                             f"positions for {tuple(self.grid)}: change frames or size, or build another encoder")
        x = self.patch_embed(clips, keep)
        if placed:
            x = x + (self.pos_embed if keep is None else gather(self.pos_embed, keep))
        outputs = []
        for block in self.blocks:
            x = block(x, attn_mask=attention_mask(valid))
            outputs.append(x)
        return outputs if layers else self.norm(x)

    def freeze(self, blocks: int) -> None:
        """Freeze the first `blocks` blocks and, with them, the tubelet embedding: no backward pass goes there."""
        if not 0 <= blocks <= len(self.blocks):
            raise ValueError(f"freeze={blocks}: choose 0…{len(self.blocks)}, the blocks that this encoder has")
        if blocks:
            self.patch_embed.requires_grad_(False)
            self.blocks[:blocks].requires_grad_(False)


class Predictor(nn.Module):
    """P_phi: context features [B, Kc, D] and where to predict [B, Kt] -> predicted features [B, Kt, D'].

    D' is D unless the features to predict are those of an encoder of another width, `target_width`.
    One mask token per mask kind (short, long range), zero at the start; what tells the masked tokens apart is
    the fixed position added to them (the paper's Delta y).
    """

    def __init__(self, grid: Grid, encoder_width: int, width: int, depth: int, heads: int, kinds: int = 2,
                 target_width: int | None = None):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, width)) for _ in range(kinds))
        self.register_buffer("predictor_pos_embed", sincos3d(grid, width), persistent=False)
        self.predictor_blocks = make_blocks(width, depth, heads)
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, target_width or encoder_width)
        init_linear(self.predictor_embed, encoder_width)
        init_linear(self.predictor_proj, width)

    def forward(self, z: Tensor, masks, kind: int | Tensor = 0) -> Tensor:
        """`masks` is a `masking.Masks`; `kind` chooses the mask token, for all clips or one each (int64 [B])."""
        context = self.predictor_embed(z) + gather(self.predictor_pos_embed, masks.context)
        token = self.mask_tokens[kind] if isinstance(kind, int) else torch.cat([*self.mask_tokens])[kind]
        target = token + gather(self.predictor_pos_embed, masks.target)
        x = torch.cat([context, target], 1)
        for block in self.predictor_blocks:
            x = block(x, attn_mask=attention_mask(masks.valid))
        return self.predictor_proj(self.predictor_norm(x[:, masks.context.shape[1]:]))


class PixelDecoder(nn.Module):
    """VideoMAE's decoder: context features [B, Kc, D] -> pixels of the masked tubelets [B, Kt, pt·ph·pw·C]."""

    def __init__(self, grid: Grid, tubelet: Grid, encoder_width: int, width: int, depth: int, heads: int,
                 channels: int = 1, positions: str = "sincos1d"):
        super().__init__()
        self.encoder_to_decoder = nn.Linear(encoder_width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer("pos_embed", POSITIONS[positions](grid, width), persistent=False)
        self.blocks = make_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, math.prod(tubelet) * channels)
        init_linear(self.encoder_to_decoder, encoder_width)
        init_linear(self.head, width)

    def forward(self, z: Tensor, masks) -> Tensor:
        context = self.encoder_to_decoder(z) + gather(self.pos_embed, masks.context)
        x = torch.cat([context, self.mask_token + gather(self.pos_embed, masks.target)], 1)
        for block in self.blocks:
            x = block(x, attn_mask=attention_mask(masks.valid))
        return self.head(self.norm(x[:, masks.context.shape[1]:]))
