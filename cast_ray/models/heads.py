"""Heads: from an encoder's and decoder's features to a class and a mask of each query, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import EomtConfig, Mask2FormerConfig
from transformers.models.eomt.modeling_eomt import EomtMaskHead, EomtScaleBlock
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMLPPredictionHead,
    Mask2FormerSinePositionEmbedding,
)

from cast_ray.models.decoders import MASK_STRIDE, DecodedFeatures
from cast_ray.models.vit_encoders import Tokens, ViTEncoder
from cast_ray.recipe import ModelConfig

PROPOSAL_STRIDE = 8
NUM_ATTENDED_LEVELS = 3
ANNEALING_POWER = 0.9


@dataclass
class HeadOutput:
    """class_logits: L tensors [B, Q, C+1]; mask_logits: L tensors [B, Q, h, w]; auxiliary: see `Predictions`."""

    class_logits: list[torch.Tensor]
    mask_logits: list[torch.Tensor]
    auxiliary: dict[str, torch.Tensor] = field(default_factory=dict)


class MaskedAttentionHead(nn.Module):
    """Q queries refined by masked attention, coarse to fine over three levels.

    With `config.proposals` every token of the stride-8 map predicts a class and a mask embedding; the Q best local
    maxima of objectness give the queries' contents and positions, in falling order, each added to its slot's learnt
    embedding. Without, contents and positions are the learnt embeddings alone, as in Mask2Former.

    Source: Cheng et al. 2022 by transformers' Mask2FormerMaskedAttentionDecoder; query selection after Zhu et al.
    2021 (two-stage Deformable DETR). Deviations: selection by local maxima, so that neighbouring tokens of one instance
    do not fill all queries.
    """

    def __init__(self, config: ModelConfig, num_classes: int):
        super().__init__()
        dim = config.hidden_dim
        self.proposals, self.num_queries = config.proposals, config.num_queries
        self.position = Mask2FormerSinePositionEmbedding(dim // 2, normalize=True)
        self.decoder = Mask2FormerMaskedAttentionDecoder(
            Mask2FormerConfig(
                hidden_dim=dim,
                mask_feature_size=dim,
                num_attention_heads=config.num_heads,
                dim_feedforward=config.feedforward_dim,
                decoder_layers=config.num_layers + 1,  # transformers builds one layer fewer than it is told
                dropout=0.0,
                pre_norm=False,
            )
        )
        self.level_embedding = nn.Embedding(NUM_ATTENDED_LEVELS, dim)
        self.query_content = nn.Embedding(config.num_queries, dim)
        self.query_position = nn.Embedding(config.num_queries, dim)
        self.class_head = nn.Linear(dim, num_classes + 1)
        if config.proposals:
            # The proposals have separate heads: many tokens may stand for one instance, but only one query may.
            self.proposal_content = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
            self.proposal_norm = nn.LayerNorm(dim)
            self.proposal_class = nn.Linear(dim, num_classes + 1)
            self.proposal_mask = Mask2FormerMLPPredictionHead(dim, dim, dim)
        for layer in self.decoder.layers:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, decoded: DecodedFeatures) -> HeadOutput:
        """One set of predictions per layer and one before the first.

        Returns:
            `auxiliary` holds, with proposals, the inputs of `losses.proposals.proposal_loss`: proposal_class_logits
            [B, C+1, h, w], proposal_mask_embeddings [B, D, h, w] (stride 8) and mask_features [B, D, H / 4, W / 4].
        """
        auxiliary: dict[str, torch.Tensor] = {}
        batch = decoded.mask_features.shape[0]
        if self.proposals:
            content, position, auxiliary = self._propose(decoded)
        else:
            content = self.query_content.weight.expand(batch, -1, -1)
            position = self.query_position.weight.expand(batch, -1, -1)
        # Masked attention goes from coarse to fine over three levels; if there are fewer, it begins again with the
        # first.
        levels = list(decoded.levels.values())[:NUM_ATTENDED_LEVELS]
        levels = [levels[i % len(levels)] for i in range(NUM_ATTENDED_LEVELS)]
        out = self.decoder(
            inputs_embeds=content.transpose(0, 1),
            query_position_embeddings=position.transpose(0, 1),
            multi_stage_positional_embeddings=[self._positions(x).flatten(2).permute(2, 0, 1) for x in levels],
            encoder_hidden_states=[
                x.flatten(2).permute(2, 0, 1) + self.level_embedding.weight[i] for i, x in enumerate(levels)
            ],
            pixel_embeddings=decoded.mask_features,
            feature_size_list=[x.shape[-2:] for x in levels],
            return_dict=True,
        )
        return HeadOutput(
            [self.class_head(x.transpose(0, 1)) for x in out.intermediate_hidden_states],
            list(out.masks_queries_logits),
            auxiliary,
        )

    def _positions(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        return self.position(x_BDHW.shape, x_BDHW.device, x_BDHW.dtype)

    def _propose(self, decoded: DecodedFeatures) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Query contents and positions [B, Q, D] from the dense proposals, and what their loss needs."""
        stride = max(s for s in decoded.levels if s <= PROPOSAL_STRIDE)
        level = decoded.levels[stride]
        grid = (level.shape[2], level.shape[3])
        tokens_BTD = level.flatten(2).transpose(1, 2)
        tokens_BTD = tokens_BTD + self.proposal_content(tokens_BTD)
        normed_BTD = self.proposal_norm(tokens_BTD)
        class_logits_BTC = self.proposal_class(normed_BTD)
        embeddings_BTD = self.proposal_mask(normed_BTD)
        index_BQ = pick_proposals(class_logits_BTC.detach(), grid, self.num_queries)
        rows = torch.arange(index_BQ.shape[0], device=index_BQ.device)[:, None]
        num = index_BQ.shape[1]
        content = tokens_BTD[rows, index_BQ] + self.query_content.weight[:num]
        position_BTD = self._positions(level).flatten(2).transpose(1, 2)
        position = position_BTD[rows, index_BQ] + self.query_position.weight[:num]
        as_map = lambda x_BTD: x_BTD.transpose(1, 2).unflatten(2, grid)  # noqa: E731
        return (
            content,
            position,
            {
                "proposal_class_logits": as_map(class_logits_BTC),
                "proposal_mask_embeddings": as_map(embeddings_BTD),
                "mask_features": decoded.mask_features,
            },
        )


@torch.no_grad()
def pick_proposals(class_logits_BTC: torch.Tensor, grid: tuple[int, int], num: int) -> torch.Tensor:
    """Tokens with the highest objectness 1 - P(no object), local maxima of their 3x3 neighbourhood first.

    Args:
        class_logits_BTC: float [B, h*w, C+1], last class no-object.
        grid: h, w.
        num: Q.

    Returns:
        int64 [B, min(Q, h*w)], in falling order of rank.
    """
    objectness = 1 - class_logits_BTC.float().softmax(-1)[..., -1]
    map_B1HW = objectness.unflatten(1, grid)[:, None]
    is_peak = map_B1HW == F.max_pool2d(map_B1HW, 3, stride=1, padding=1)
    rank = (map_B1HW + is_peak).flatten(1)
    return rank.topk(min(num, rank.shape[1]), dim=1).indices


class EomtHead(nn.Module):
    """Encoder-only mask transformer: Q query tokens join the last L layers of a plain ViT.

    Before each of these layers the queries predict masks, and with probability p_l a query sees only the patches inside
    its own. p_l falls from 1 to 0 during training, the first layer's first (`anneal`): a finished model needs no mask
    before its last, which is what makes it fast. p is stored with the weights.

    Args:
        config: num_queries and num_layers = L.
        num_classes: C.
        encoder: whose width and patch size the head has; its last L layers are run here.

    Source: Kerssies et al. 2025 by transformers' EomtMaskHead and EomtScaleBlock; annealing as in the authors' code,
    layer l of L from (l+1)/(L+2) to (l+2)/(L+2) of the steps with power .9. Deviations: works on any ViT here, with its
    own position embeddings and at any image size.
    """

    attn_mask_probs: torch.Tensor

    def __init__(self, config: ModelConfig, num_classes: int, encoder: ViTEncoder):
        super().__init__()
        width = encoder.width
        num_upscales = max(1, round(math.log2(encoder.patch_px / MASK_STRIDE)))
        settings = EomtConfig(hidden_size=width, num_attention_heads=1, num_upscale_blocks=num_upscales)
        self.num_layers, self.num_queries = config.num_layers, config.num_queries
        self.query = nn.Embedding(config.num_queries, width)
        self.upscale_block = EomtScaleBlock(settings)
        self.mask_head = EomtMaskHead(settings)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.register_buffer("attn_mask_probs", torch.ones(config.num_layers))
        self.probs = [1.0] * config.num_layers  # the same, without a copy from the device in every step
        self.register_load_state_dict_post_hook(_read_probs)

    def anneal(self, progress: float) -> None:
        """Sets p_l for the share of the training steps that is done, 0..1. It never rises: refinement continues at
        0."""
        num = self.num_layers
        shares = [min(max(progress * (num + 2) - (layer + 1), 0.0), 1.0) for layer in range(num)]
        self.probs = [min(p, (1 - share) ** ANNEALING_POWER) for p, share in zip(self.probs, shares)]
        self.attn_mask_probs.copy_(torch.tensor(self.probs))

    def forward(self, encoder: ViTEncoder, tokens: Tokens, states_BTD: torch.Tensor) -> HeadOutput:
        """Runs the joint layers.

        Args:
            encoder: the encoder that the constructor was given.
            tokens: tokens of the image.
            states_BTD: after the encoder's own layers.

        Returns:
            Predictions before each masked layer and after the last; in evaluation those of annealed layers are left
            out. Masks are over the padded image, at the patch's stride / 2^U.
        """
        out = HeadOutput([], [])
        states_BTD = torch.cat([self.query.weight.expand(states_BTD.shape[0], -1, -1), states_BTD], dim=1)
        for layer, prob in zip(encoder.transformer_layers[encoder.num_own_layers :], self.probs):
            mask = None
            if self.training or prob > 0:
                self._predict(encoder, states_BTD, tokens.grid, out)
                mask = self._attention_mask(out.mask_logits[-1], states_BTD.shape[1], tokens.grid, prob)
            states_BTD = layer(states_BTD, attention_mask=mask, **tokens.options)
        self._predict(encoder, states_BTD, tokens.grid, out)
        return out

    def _predict(self, encoder: ViTEncoder, states_BTD: torch.Tensor, grid: tuple[int, int], out: HeadOutput) -> None:
        normed = encoder.norm(states_BTD)
        queries = normed[:, : self.num_queries]
        patches = normed[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        out.class_logits.append(self.class_head(queries))
        out.mask_logits.append(
            torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), self.upscale_block(patches)),
        )

    @torch.no_grad()
    def _attention_mask(
        self, mask_logits: torch.Tensor, num_tokens: int, grid: tuple[int, int], prob: float
    ) -> torch.Tensor:
        """bool [B, 1, T, T], True where a token (row) may see another; only queries are kept from patches."""
        inside = F.interpolate(mask_logits.float(), size=grid, mode="bilinear", align_corners=False).flatten(2) > 0
        if prob < 1:
            inside |= (torch.rand(inside.shape[:2], device=inside.device) > prob)[..., None]
        mask = inside.new_ones(inside.shape[0], num_tokens, num_tokens)
        mask[:, : self.num_queries, -inside.shape[2] :] = inside
        return mask[:, None]


def _read_probs(head: EomtHead, _: object) -> None:
    head.probs = head.attn_mask_probs.tolist()
