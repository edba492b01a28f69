"""SAM3 by transformers as a teacher: one model from a class's words to the masks of all its instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category, Predictions, Targets
from cast_ray.losses.teacher.detector import QueryDetections, boxes_of, detection_loss, match_boxes
from cast_ray.losses.teacher.prompted_masks import prompted_mask_loss
from cast_ray.models.cast_network import Output, TrainedNetwork
from cast_ray.models.checkpoints import load_model, load_processor, load_tokenizer
from cast_ray.models.postprocess import can_reach, encode_masks
from cast_ray.models.projector import Projector, select_stride
from cast_ray.recipe import ContrastiveConfig, GroundedSamConfig, InputSize, TeacherConfig, TrainConfig
from cast_ray.teachers.fusion import suppress
from cast_ray.teachers.prompts import class_words
from cast_ray.teachers.protocol import Teacher, TeacherTerms, checkpoint_layers

CHECKPOINT = "teacher.sam3.checkpoint"
MODELS = {"sam3": Sam3Model, "sam3_video": Sam3Model}
"""The published checkpoint calls itself a video model."""
PROMPT_TOKENS = 32
SYNONYM_IOU = 0.6
"""Masks of one class that two of its synonyms found are one instance from here on."""


@dataclass
class Asked:
    """What the model says about pairs of an image and some words.

    logits: float [N, Q], of the probability that query k shows what was asked for; boxes: [N, Q, 4] corners in 0..1;
    masks: logits [N, Q, h, w] that cover the image edge to edge.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor


class PromptedSam3(nn.Module):
    """A SAM3 with its tokenizer and the normalisation of its images."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    @property
    def patch_px(self) -> int:
        return self.model.config.vision_config.backbone_config.patch_size

    @property
    def feature_dims(self) -> dict[int, int]:
        return {self.patch_px: self.model.config.vision_config.backbone_config.hidden_size}

    def see(self, images: Sequence[torch.Tensor]) -> Any:
        """The vision encoder's output for B images uint8 [3, h, w] of any sizes, each resized to the model's square."""
        side = self.model.config.vision_config.image_size
        size = [side, side]
        pixels = torch.cat(
            [F.interpolate(i[None].float(), size=size, mode="bilinear", antialias=True) / 255 for i in images]
        )
        return self.model.get_vision_features(pixel_values=(pixels - self.pixel_mean) / self.pixel_std)

    def feature_map(self, seen: Any) -> torch.Tensor:
        """The backbone's map [B, D, h, w], before the model's necks."""
        side = self.model.config.vision_config.image_size // self.patch_px
        return seen.last_hidden_state.transpose(1, 2).unflatten(2, (side, side))

    @torch.no_grad()
    def read(self, words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text features [P, T, D] of some words and their attention mask [P, T]."""
        device = self.pixel_mean.device
        tokens = self.tokenizer(
            list(words), return_tensors="pt", padding="max_length", max_length=PROMPT_TOKENS, truncation=True
        ).to(device)
        out = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return out.pooler_output, tokens["attention_mask"]

    def ask(
        self, seen: Any, text: tuple[torch.Tensor, torch.Tensor], image: torch.Tensor, words: torch.Tensor
    ) -> Asked:
        """Answers for pairs.

        Args:
            seen: of `see`.
            text: of `read`.
            image, words: int64 [N], the image and the words of each pair.
        """
        features, mask = text
        pairs = type(seen)(
            fpn_hidden_states=tuple(maps[image] for maps in seen.fpn_hidden_states),
            fpn_position_encoding=tuple(
                maps.expand(len(seen.last_hidden_state), -1, -1, -1)[image] for maps in seen.fpn_position_encoding
            ),
        )
        out = self.model(
            vision_embeds=pairs,
            text_embeds=BaseModelOutputWithPooling(pooler_output=features[words]),
            attention_mask=mask[words],
        )
        log_p = F.logsigmoid(out.pred_logits.float()) + F.logsigmoid(out.presence_logits.float())
        # logit(p) of p = P(query shows it) P(it is there), without leaving the logarithm
        logits = log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))
        return Asked(logits, out.pred_boxes.float(), out.pred_masks)


class Sam3Teacher(Teacher):
    """SAM3, asked for one class at a time; zero-shot, or fine-tuned on the masks of the classes.

    Source: transformers' Sam3Model, scores as its post-processing. Beyond the papers. Deviations: transformers gives
    neither a loss nor the answers of the earlier decoder layers, so fine-tuning is by this project's own terms (those
    of the detector, and focal and dice of the matched masks) on the last layer.
    """

    kind = "sam3"
    takes_any_class = True

    def __init__(
        self,
        model: PromptedSam3,
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ):
        super().__init__(config, categories, input_size)
        self.model = model
        words = class_words(self.categories, config.prompt)
        self.words = [word for mine in words for word in mine]
        self.label_of = [label for label, mine in enumerate(words) for _ in mine]
        self.has_synonyms = len(self.words) > len(words)

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ) -> Sam3Teacher:
        folder = folders[CHECKPOINT]
        model = load_model(MODELS, folder, CHECKPOINT)
        prompted = PromptedSam3(model, load_tokenizer(folder, CHECKPOINT), load_processor(folder, CHECKPOINT))
        return cls(prompted, config, categories, input_size)

    def save_weights(self, folder: Path) -> None:
        for part in (self.model.model, self.model.tokenizer, self.model.processor):
            part.save_pretrained(folder / "checkpoint")

    def find(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        cut = [image[:, :height, :width] for image, (height, width) in zip(images, resized_hw)]
        seen, text = self.model.see(cut), self.model.read(self.words)
        pairs = [(b, w) for b in range(len(cut)) for w in range(len(self.words))]
        found: list[Instances] = [[] for _ in cut]
        step = self.config.sam3.prompts_at_a_time
        for start in range(0, len(pairs), step):
            some = pairs[start : start + step]
            image, words = (torch.tensor(side, device=images.device) for side in zip(*some))
            answer = self.model.ask(seen, text, image, words)
            for n, (b, w) in enumerate(some):
                found[b] += self._instances(answer, n, self.label_of[w], image_hw[b], max_detections, min_score)
        if self.has_synonyms:
            found = [suppress(of_image, SYNONYM_IOU) for of_image in found]
        return [sorted(i, key=lambda instance: -instance["score"])[:max_detections] for i in found]

    def _instances(
        self, answer: Asked, n: int, label: int, size: tuple[int, int], max_detections: int, min_score: float
    ) -> Instances:
        rank_by = self.config.inference.rank_by
        probabilities = answer.logits[n].sigmoid()
        top, query = probabilities.topk(min(max_detections, len(probabilities)))
        kept = top > self.config.inference.score_threshold
        if rank_by != "segmenter":  # whose score is known from the mask alone
            kept &= can_reach(top, min_score)
        query, top = query[kept], top[kept]
        if not len(query):
            return []
        resize = lambda m: F.interpolate(m[None], size=size, mode="bilinear", align_corners=False)[0]  # noqa: E731
        rles, quality = encode_masks(answer.masks[n, query], resize, size[0] * size[1])
        height, width = size
        boxes = answer.boxes[n, query].clamp(0, 1) * top.new_tensor([width, height, width, height])
        rank = {"detector": lambda s, _: s, "segmenter": lambda _, q: q, "product": lambda s, q: s * q}[rank_by]
        return [
            {
                "label": label,
                "score": rank(score, q),
                "rle": rle["counts"],
                "size": list(size),
                "mask_quality": q,
                "box": box,
            }
            for score, rle, q, box in zip(top.tolist(), rles, quality, boxes.tolist())
            if q > 0 and not rank(score, q) < min_score
        ]

    def for_training(self, contrastive: ContrastiveConfig | None) -> tuple[TrainedNetwork, TeacherTerms]:
        return Sam3Network(self, contrastive), Sam3Terms()


class Sam3Terms:
    """Class, box and mask terms of pairs of an image and a class that was asked for, added up for each image.

    Weights and matching costs are the defaults of `GroundedSamConfig`; the class term is focal, on one token a pair.
    """

    def __init__(self) -> None:
        self.config = config = GroundedSamConfig()
        self.weights = {
            "class": config.class_weight,
            "box": config.box_weight,
            "giou": config.giou_weight,
            "mask_focal": config.mask_focal_weight,
            "mask_dice": config.mask_dice_weight,
        }

    def __call__(self, output: Output, targets: Sequence[Targets]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found = output.predictions.auxiliary
        logits_BPQ, boxes_BPQ4, masks, asked = found["logits"], found["boxes"], found["masks"], found["asked"].long()
        num_asked = asked.shape[1]
        wanted = [_of_class(t, label) for t, labels in zip(targets, asked.tolist()) for label in labels]
        logits_N1, boxes = logits_BPQ.flatten(0, 1)[..., None], boxes_BPQ4.flatten(0, 1)
        one = logits_N1.new_ones((len(wanted), 1, 1))
        terms = detection_loss(QueryDetections([logits_N1], [boxes], one), wanted, self.config)
        terms |= prompted_mask_loss(*self._matched(logits_N1, boxes, masks.flatten(0, 1), wanted), wanted)
        per_image = {
            name: tuple(values.unflatten(0, (len(targets), num_asked)).sum(1) for values in terms[name])
            for name in self.weights
        }
        return {name: (sums, counts) for name, (sums, counts) in per_image.items()}

    def _matched(
        self, logits_N1: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor, wanted: Sequence[Targets]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks [N, M, h, w] of matched queries, IoUs that nothing predicts, and the instance [N, M] of each."""
        places = max([1, *(len(t.labels) for t in wanted)])
        places = min(places, logits_N1.shape[1])
        instance = masks.new_full((len(wanted), places), -1.0, dtype=torch.float32)
        query = torch.zeros((len(wanted), places), dtype=torch.int64, device=masks.device)
        for n, target in enumerate(wanted):
            if not len(target.labels):
                continue
            height, width = target.masks.shape[-2:]
            truth = boxes_of(target.masks, (height, width))
            tokens = truth.new_ones((len(truth), 1))
            queries, instances = match_boxes(
                logits_N1[n][None].float(), boxes[n][None].float(), truth, tokens, self.config
            )
            query[n, : queries.shape[1]] = queries[0]
            instance[n, : queries.shape[1]] = instances[0].float()
        rows = torch.arange(len(wanted), device=masks.device)[:, None]
        return masks[rows, query], torch.zeros_like(instance), instance


def _of_class(target: Targets, label: int) -> Targets:
    mine = target.labels == label
    return Targets(target.masks[mine], torch.zeros_like(target.labels[mine]), target.weights[mine], target.ignore)


class Sam3Network(TrainedNetwork):
    """Trains a `Sam3Teacher` in place; the text encoder stays frozen.

    A step asks every image for the same classes: those that the step's images show, then others at random, at most
    `sam3.max_asked`. L_pxl is taken on the vision backbone's map; y is made of the K surest answers, P_c of one = its
    probability for the class asked for, P_m = its mask.
    """

    def __init__(self, teacher: Sam3Teacher, contrastive: ContrastiveConfig | None):
        super().__init__()
        self._teacher = (teacher,)  # in a tuple: its weights are registered below, part by part
        self.config = teacher.config.sam3
        self.sam3, self.num_classes = teacher.model, len(teacher.categories)
        self.words, self.label_of = teacher.words, teacher.label_of
        self.contrastive = contrastive
        model = self.sam3.model
        model.requires_grad_(True)
        model.text_encoder.requires_grad_(False)
        model.geometry_encoder.requires_grad_(False)
        if contrastive is not None:
            self.stride = select_stride(self.sam3.feature_dims, contrastive)
            self.projector = Projector(self.sam3.feature_dims[self.stride], contrastive)

    @property
    def trained(self) -> nn.Module:
        return self._teacher[0].trained

    def train(self, mode: bool = True) -> Sam3Network:
        super().train(mode)
        self.sam3.model.text_encoder.eval()
        return self

    def lr_factors(self, config: TrainConfig) -> dict[int, float]:
        return {id(p): config.encoder_lr_factor for p in self.sam3.model.vision_encoder.backbone.parameters()}

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self)

    def forward(
        self, weak: torch.Tensor, strong: torch.Tensor | None = None, targets: Sequence[Targets] = ()
    ) -> Output:
        asked = self._classes(targets)
        seen, text = self.sam3.see(list(weak)), self.sam3.read([self.words[self.label_of.index(c)] for c in asked])
        image = torch.arange(len(weak), device=weak.device).repeat_interleave(len(asked))
        words = torch.arange(len(asked), device=weak.device).repeat(len(weak))
        answer = self.sam3.ask(seen, text, image, words)
        pairs = (len(weak), len(asked))
        auxiliary = {
            "logits": answer.logits.unflatten(0, pairs),
            "boxes": box_convert(answer.boxes, "xyxy", "cxcywh").unflatten(0, pairs),
            "masks": answer.masks.unflatten(0, pairs),
            "asked": torch.tensor(asked, dtype=torch.float32, device=weak.device).expand(len(weak), -1),
        }
        predictions = Predictions([], [], {}, auxiliary)
        if self.projector is None or self.contrastive is None or strong is None:
            return Output(predictions)
        class_logits, mask_logits = self._described(auxiliary)
        predictions.class_logits, predictions.mask_logits = [class_logits], [mask_logits]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.contrastive.strong_grad):
            strong_map = self.sam3.feature_map(self.sam3.see(list(strong)))
        return Output(predictions, *self.projector(self.sam3.feature_map(seen), strong_map))

    def _classes(self, targets: Sequence[Targets]) -> list[int]:
        shown = set(torch.cat([t.labels for t in targets]).tolist()) if targets else set()
        order = torch.randperm(self.num_classes).tolist()
        return sorted(sorted(order, key=lambda label: label not in shown)[: self.config.max_asked])

    @torch.no_grad()
    def _described(self, found: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What y is made of: class logits [B, K, C+1] and mask logits [B, K, h, w]."""
        logits_BN = found["logits"].flatten(1)
        num_queries = found["logits"].shape[2]
        top_BK, index_BK = logits_BN.topk(min(self.config.contrast_queries, logits_BN.shape[1]), dim=1)
        rows = torch.arange(len(logits_BN), device=logits_BN.device)[:, None]
        masks = found["masks"].flatten(1, 2)[rows, index_BK].float()
        label_BK1 = found["asked"].long().gather(1, index_BK // num_queries)[..., None]
        class_logits = top_BK.new_full((*top_BK.shape, self.num_classes + 1), torch.logit(torch.tensor(1e-4)).item())
        class_logits[..., -1] = 0
        return class_logits.scatter(2, label_BK1, top_BK[..., None]), masks
