"""The method's teacher: a text-prompted detector finds boxes, a box-prompted segmenter turns them into masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

from cast_ray.contracts.instance import Instance, Instances
from cast_ray.contracts.records import Category, Predictions, Targets
from cast_ray.losses.teacher.detector import QueryDetections, boxes_of, detection_loss
from cast_ray.losses.teacher.prompted_masks import prompted_mask_loss
from cast_ray.models.cast_network import Output, TrainedNetwork
from cast_ray.models.postprocess import encode_masks
from cast_ray.models.projector import Projector, select_stride
from cast_ray.recipe import ContrastiveConfig, GroundedSamConfig, InputSize, TeacherConfig, TrainConfig
from cast_ray.teachers.box_segmenter import BoxSegmenter
from cast_ray.teachers.detector import FoundBoxes, TextDetector
from cast_ray.teachers.prompts import Prompt, Prompter
from cast_ray.teachers.protocol import Teacher, TeacherTerms, checkpoint_layers

DETECTOR, SEGMENTER = "teacher.grounded_sam.detector", "teacher.grounded_sam.segmenter"
BOX_LOGIT = 6.0
"""Logit of the pixels inside a box that stands for a mask; its negative outside."""
BOX_STRIDE = 8
"""Stride of the maps of such boxes."""


class GroundedSamTeacher(Teacher):
    """(MM-)Grounding-DINO and SAM2. Zero-shot from their checkpoints, or fine-tuned by the stages.

    Args:
        detector, segmenter: loaded.
        config, categories, input_size: see `Teacher`.

    Source: CAST (arXiv 2505.21904), its teacher of a detector and a promptable segmenter.
    """

    kind = "grounded_sam"
    takes_any_class = True

    def __init__(
        self,
        detector: TextDetector,
        segmenter: BoxSegmenter,
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ):
        super().__init__(config, categories, input_size)
        self.detector, self.segmenter = detector, segmenter
        self.prompter = Prompter(detector.tokenizer, self.categories, config.prompt, detector.max_tokens)
        self._prompts: list[Prompt] = []

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ) -> GroundedSamTeacher:
        detector = TextDetector.load(folders[DETECTOR], DETECTOR)
        return cls(detector, BoxSegmenter.load(folders[SEGMENTER], SEGMENTER), config, categories, input_size)

    def save_weights(self, folder: Path) -> None:
        self.detector.save(folder / "detector")
        self.segmenter.save(folder / "segmenter")

    def prompts(self) -> list[Prompt]:
        """Returns the prompts of all classes, on the device."""
        if not self._prompts or self._prompts[0].input_ids.device != self.device:
            self._prompts = [prompt.to(self.device) for prompt in self.prompter.all_prompts()]
        return self._prompts

    def find(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        settings = self.config.inference
        cut = [image[:, :height, :width] for image, (height, width) in zip(images, resized_hw)]
        found = self.detector.detect(
            cut, self.prompts(), len(self.categories), settings.score_threshold, max_detections
        )
        # A box that was found as several classes needs one mask.
        unique = [boxes.corners.unique(dim=0, return_inverse=True) for boxes in found]
        image = torch.cat([torch.full((len(c),), b, device=images.device) for b, (c, _) in enumerate(unique)])
        corners = torch.cat([c for c, _ in unique])
        masks, ious = corners.new_zeros((0, 1, 1)), corners.new_zeros(0)
        if len(corners):
            embeddings = self.segmenter.embed(cut)
            masks, ious = self.segmenter.masks_in_parts(embeddings, image, corners, settings.boxes_at_a_time)
        counts = [len(c) for c, _ in unique]
        return [
            self._instances(boxes, place, m, q.float().clamp(0, 1), size, min_score)
            for boxes, (_, place), m, q, size in zip(found, unique, masks.split(counts), ious.split(counts), image_hw)
        ]

    def _instances(
        self,
        found: FoundBoxes,
        place: torch.Tensor,
        masks: torch.Tensor,
        ious: torch.Tensor,
        size: tuple[int, int],
        min_score: float,
    ) -> Instances:
        scores = {"detector": found.scores, "segmenter": ious[place], "product": found.scores * ious[place]}
        score = scores[self.config.inference.rank_by].tolist()
        kept = [n for n, s in enumerate(score) if not s < min_score]
        used = place[kept].unique()
        encoded, _ = encode_masks(masks[used], lambda logits: _resized(logits, size), size[0] * size[1])
        rles = dict(zip(used.tolist(), encoded))
        labels, places, qualities = found.labels.tolist(), place.tolist(), ious[place].tolist()
        height, width = size
        corners = (found.corners * found.corners.new_tensor([width, height, width, height])).tolist()
        instances: list[Instance] = [
            {
                "label": labels[n],
                "score": score[n],
                "rle": rles[places[n]]["counts"],
                "size": list(size),
                "mask_quality": qualities[n],
                "box": corners[n],
            }
            for n in kept
        ]
        return sorted(instances, key=lambda instance: -instance["score"])

    def for_training(self, contrastive: ContrastiveConfig | None) -> tuple[TrainedNetwork, TeacherTerms]:
        return GroundedSamNetwork(self, contrastive), GroundedSamTerms(self.config.grounded_sam)


def _resized(logits_KHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits_KHW[None], size=size, mode="bilinear", align_corners=False)[0]


class GroundedSamTerms:
    """Boxes and classes of the detector, masks and predicted IoUs of the segmenter; see `losses`."""

    def __init__(self, config: GroundedSamConfig):
        self.config = config
        self.weights: dict[str, float] = {}
        if config.train_detector:
            self.weights |= {"class": config.class_weight, "box": config.box_weight, "giou": config.giou_weight}
        if config.train_segmenter:
            self.weights |= {
                "mask_focal": config.mask_focal_weight,
                "mask_dice": config.mask_dice_weight,
                "mask_iou": config.mask_iou_weight,
            }

    def __call__(self, output: Output, targets: Sequence[Targets]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found = output.predictions.auxiliary
        terms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.config.train_detector:
            num = sum(name.startswith("token_logits_") for name in found)
            logits = [found[f"token_logits_{i}"] for i in range(num)]
            detections = QueryDetections(logits, [found[f"boxes_{i}"] for i in range(num)], found["tokens"])
            terms |= detection_loss(detections, targets, self.config)
        if self.config.train_segmenter:
            terms |= prompted_mask_loss(found["masks"], found["ious"], found["instance"], targets)
        return terms


class GroundedSamNetwork(TrainedNetwork):
    """Trains a `GroundedSamTeacher` in place: the detector on images and prompt, the segmenter on ground-truth boxes.

    Frozen: the text encoder, the segmenter's image encoder and whatever the recipe switches off. Where the classes do
    not fit into one prompt, a step asks for those that its images show and fills up with others at random.

    L_pxl is taken on the detector's backbone maps, before text is fused into them: the papers project encoder features,
    and only there does the strong view need no second pass through the detector. Its y (no gradient) is made of the K
    best boxes of the detector's last layer: P_c of k = softmax over [logit of each class's score, 0], the two-sided
    form of a sigmoid with 0 for no object; P_m = softmax over k of the segmenter's mask logits for the box of k (or of
    the box itself, see `contrast_masks`).

    Deviations: the released code has no contrastive term for its teacher and fine-tunes the two models apart; the
    choice of maps and y is this project's reading of the paper. Both models train in one step here, with gradients
    clipped apart.
    """

    def __init__(self, teacher: GroundedSamTeacher, contrastive: ContrastiveConfig | None):
        super().__init__()
        self._teacher = (teacher,)  # in a tuple: its weights are registered below, part by part
        self.config = teacher.config.grounded_sam
        self.boxes_at_a_time = teacher.config.inference.boxes_at_a_time
        self.detector, self.segmenter = teacher.detector, teacher.segmenter
        self.prompter, self.num_classes = teacher.prompter, len(teacher.categories)
        self.contrastive = contrastive
        self.requires_grad_(False)
        if self.config.train_detector:
            self.detector.requires_grad_(True)
            self.detector.text_encoder().requires_grad_(False)
        if self.config.train_segmenter:
            self.segmenter.model.prompt_encoder.requires_grad_(True)
            self.segmenter.model.mask_decoder.requires_grad_(True)
        if contrastive is not None:
            assert self.config.train_detector
            self.stride = select_stride(self.detector.feature_dims, contrastive)
            self.projector = Projector(self.detector.feature_dims[self.stride], contrastive)

    @property
    def trained(self) -> nn.Module:
        return self._teacher[0].trained

    def train(self, mode: bool = True) -> GroundedSamNetwork:
        """Frozen parts stay in evaluation mode: their dropout would only add noise."""
        super().train(mode)
        self.detector.text_encoder().eval()
        self.segmenter.model.vision_encoder.eval()
        if not self.config.train_detector:
            self.detector.eval()
        return self

    def lr_factors(self, config: TrainConfig) -> dict[int, float]:
        factors = {id(p): config.encoder_lr_factor for p in self.detector.backbone_parameters()}
        return factors | {id(p): self.config.segmenter_lr_factor for p in self.segmenter.parameters()}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        segmenter = list(self.segmenter.parameters())
        mine = {id(p) for p in segmenter}
        return [[p for p in self.parameters() if id(p) not in mine], segmenter]

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self)

    def forward(
        self, weak: torch.Tensor, strong: torch.Tensor | None = None, targets: Sequence[Targets] = ()
    ) -> Output:
        """Predictions of the weak view, prompted with the targets, and the projections of both views."""
        auxiliary: dict[str, torch.Tensor] = {}
        predictions = Predictions([], [], {}, auxiliary)
        contrasts = self.projector is not None and strong is not None
        embeddings: list[torch.Tensor] = []
        if self.config.train_segmenter or (contrasts and self.config.contrast_masks == "segmenter"):
            embeddings = self.segmenter.embed(list(weak))
        if self.config.train_segmenter:
            masks, ious, instance = self._prompted(embeddings, targets)
            auxiliary |= {"masks": masks, "ious": ious, "instance": instance}
        if not self.config.train_detector:
            return Output(predictions)
        prompt = self._prompt_for(targets).to(weak.device)
        found, features = self.detector(weak, prompt, self.num_classes)
        for i, (logits, boxes) in enumerate(zip(found.token_logits, found.boxes)):
            auxiliary |= {f"token_logits_{i}": logits, f"boxes_{i}": boxes}
        auxiliary["tokens"] = found.token_map
        if not contrasts:
            return Output(predictions)
        assert self.projector is not None and self.contrastive is not None and strong is not None
        class_logits, mask_logits = self._described(found, prompt, embeddings, weak)
        predictions.class_logits, predictions.mask_logits = [class_logits], [mask_logits]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.contrastive.strong_grad):
            strong_features = self.detector.encode(strong)[self.stride]
        return Output(predictions, *self.projector(features[self.stride], strong_features))

    def _prompt_for(self, targets: Sequence[Targets]) -> Prompt:
        """Chooses all classes if they fit into one prompt, otherwise those of the targets and then others at random."""
        prompts = self.prompter.all_prompts()
        if len(prompts) == 1:
            return prompts[0]
        shown = set(torch.cat([t.labels for t in targets]).tolist()) if targets else set()
        order = torch.randperm(self.num_classes).tolist()
        return self.prompter.prompt_for(sorted(order, key=lambda label: label not in shown))

    def _prompted(
        self, embeddings: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks [B, M, h, w] and IoUs [B, M] of ground-truth boxes, and the instance [B, M] (-1: none) of each."""
        num_images, limit, side = len(targets), self.config.max_prompted, self.segmenter.mask_px
        device = embeddings[0].device
        instance = torch.full((num_images, limit), -1.0, device=device)
        corners, image, slot = [], [], []
        for b, target in enumerate(targets):
            chosen = torch.randperm(len(target.labels))[:limit].to(target.masks.device)
            height, width = target.masks.shape[-2:]
            corners.append(box_convert(boxes_of(target.masks[chosen], (height, width)), "cxcywh", "xyxy"))
            instance[b, : len(chosen)] = chosen.to(instance)
            image.append(torch.full((len(chosen),), b, device=device))
            slot.append(torch.arange(len(chosen), device=device))
        image_K, slot_K = torch.cat(image), torch.cat(slot)
        masks = torch.zeros((num_images, limit, side, side), device=device)
        ious = torch.zeros((num_images, limit), device=device)
        if len(image_K):
            logits, predicted = self.segmenter.masks(embeddings, image_K, torch.cat(corners))
            masks = masks.index_put((image_K, slot_K), logits.float())
            ious = ious.index_put((image_K, slot_K), predicted.float())
        return masks, ious, instance

    @torch.no_grad()
    def _described(
        self, found: QueryDetections, prompt: Prompt, embeddings: Sequence[torch.Tensor], images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What y is made of: class logits [B, K, C+1] and mask logits [B, K, h, w] of the K best boxes."""
        scores_BQC = prompt.class_scores(found.token_logits[-1].float().sigmoid(), self.num_classes)
        num = min(self.config.contrast_queries, scores_BQC.shape[1])
        best_BK = scores_BQC.max(-1).values.topk(num, dim=1).indices
        scores_BKC = scores_BQC.gather(1, best_BK[..., None].expand(-1, -1, self.num_classes))
        logits_BKC = torch.special.logit(scores_BKC, eps=1e-4)
        class_logits = torch.cat([logits_BKC, torch.zeros_like(logits_BKC[..., :1])], dim=-1)
        boxes_BK4 = found.boxes[-1].float().gather(1, best_BK[..., None].expand(-1, -1, 4))
        corners = box_convert(boxes_BK4, "cxcywh", "xyxy").clamp(0, 1)
        if self.config.contrast_masks == "boxes":
            return class_logits, box_maps(corners, (images.shape[-2] // BOX_STRIDE, images.shape[-1] // BOX_STRIDE))
        image = torch.arange(len(images), device=images.device).repeat_interleave(num)
        masks, _ = self.segmenter.masks_in_parts(embeddings, image, corners.flatten(0, 1), self.boxes_at_a_time)
        return class_logits, masks.float().unflatten(0, (len(images), num))


def box_maps(corners: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes [..., 4] in 0..1 as mask logits [..., h, w]: BOX_LOGIT for pixel centres inside, else its negative."""
    height, width = size
    y = (torch.arange(height, device=corners.device) + 0.5) / height
    x = (torch.arange(width, device=corners.device) + 0.5) / width
    left, top, right, bottom = (side[..., None] for side in corners.unbind(-1))
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    inside = rows[..., :, None] & columns[..., None, :]
    return torch.where(inside, BOX_LOGIT, -BOX_LOGIT)
