"""The segmenter of every stage: encoder, DPT decoder, masked-attention head, optional dense proposals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMLPPredictionHead,
    Mask2FormerSinePositionEmbedding,
)

from cast_ray import registry
from cast_ray.models.decoders import DecodedFeatures
from cast_ray.models.encoders import Encoder
from cast_ray.recipe import ModelConfig
from cast_ray.records import Predictions

PROPOSAL_STRIDE = 8
NUM_ATTENDED_LEVELS = 3


class Segmenter(nn.Module):
    """Mask classification: Q queries, each a class distribution and a mask, refined by masked attention.

    With `config.proposals` every token of the stride-8 map predicts a class and a mask embedding; the Q best local
    maxima of objectness give the queries' contents and positions, in falling order, each added to its slot's learnt
    embedding. Without, contents and positions are the learnt embeddings alone, as in Mask2Former.

    Source: Cheng et al. 2022 by transformers' Mask2FormerMaskedAttentionDecoder; query selection after Zhu et al.
    2021 (two-stage Deformable DETR). Deviations: DPT decoder instead of deformable attention; selection by local
    maxima, so that neighbouring tokens of one instance do not fill all queries.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, config: ModelConfig, num_classes: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.encoder: Encoder = registry.lookup("encoders", config.encoder.name)(config.encoder)
        self.feature_dims = dict(self.encoder.channels)
        self.decoder = registry.lookup("decoders", config.decoder)(self.feature_dims, config.hidden_dim)
        self.required_multiple = max(self.feature_dims)
        self.register_buffer("pixel_mean", torch.tensor(self.encoder.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.encoder.std).view(3, 1, 1) * 255, persistent=False)
        dim = config.hidden_dim
        if dim % 4 or dim % config.num_heads:
            raise ValueError(f"hidden_dim is {dim}: expected a multiple of 4 and of num_heads ({config.num_heads})")
        self.position = Mask2FormerSinePositionEmbedding(dim // 2, normalize=True)
        self.head = Mask2FormerMaskedAttentionDecoder(
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
            # Heads of their own: many tokens may claim an instance, of the queries only one.
            self.proposal_content = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
            self.proposal_norm = nn.LayerNorm(dim)
            self.proposal_class = nn.Linear(dim, num_classes + 1)
            self.proposal_mask = Mask2FormerMLPPredictionHead(dim, dim, dim)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.head.layers:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's parameters, for a learning rate of their own."""
        return self.encoder.parameters()

    def encode(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """The encoder's feature maps.

        Args:
            images: uint8 [B, 3, H, W], RGB, H and W multiples of the coarsest stride.

        Returns:
            stride -> float [B, D, H / stride, W / stride], D = `feature_dims[stride]`.

        Raises:
            ValueError: H or W is not a multiple of the coarsest stride.
        """
        height, width = images.shape[-2:]
        if height % self.required_multiple or width % self.required_multiple:
            raise ValueError(
                f"image of {height}x{width} px: expected multiples of the encoder's coarsest stride, "
                f"{self.required_multiple} (data.image_px)"
            )
        return self.encoder((images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std)

    def forward(self, images: torch.Tensor) -> Predictions:
        """Predictions of a batch, one set per masked-attention layer and one before the first.

        Args:
            images: uint8 [B, 3, H, W], RGB.

        Returns:
            Predictions; `auxiliary` holds, with `config.proposals`, the inputs of `losses.proposals.proposal_loss`:
            proposal_class_logits [B, C+1, h, w], proposal_mask_embeddings [B, D, h, w] (stride 8) and mask_features
            [B, D, H / 4, W / 4].
        """
        features = self.encode(images)
        decoded: DecodedFeatures = self.decoder(features)
        auxiliary: dict[str, torch.Tensor] = {}
        batch = images.shape[0]
        if self.config.proposals:
            content, position, auxiliary = self._propose(decoded)
        else:
            content = self.query_content.weight.expand(batch, -1, -1)
            position = self.query_position.weight.expand(batch, -1, -1)
        # Masked attention walks coarse to fine over three levels; with fewer it starts over.
        levels = list(decoded.levels.values())[:NUM_ATTENDED_LEVELS]
        levels = [levels[i % len(levels)] for i in range(NUM_ATTENDED_LEVELS)]
        out = self.head(
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
        return Predictions(
            class_logits=[self.class_head(x.transpose(0, 1)) for x in out.intermediate_hidden_states],
            mask_logits=list(out.masks_queries_logits),
            features=features,
            auxiliary=auxiliary,
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
        index_BQ = pick_proposals(class_logits_BTC.detach(), grid, self.config.num_queries)
        rows = torch.arange(len(index_BQ), device=index_BQ.device)[:, None]
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


def build_segmenter(config: ModelConfig, num_classes: int, seed: int) -> Segmenter:
    """A segmenter whose initial weights depend on `seed` only; the global random state is left as it was.

    Args:
        config: encoder, decoder and head.
        num_classes: C, without no-object.
        seed: of the initial weights.

    Raises:
        ValueError: an unknown encoder or decoder name, or a part that does not fit the others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Segmenter(config, num_classes)
