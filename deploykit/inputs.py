"""A run's images: to calibrate, verify and evaluate on."""

from __future__ import annotations

from deploykit.data import ImageSet, open_dataset
from deploykit.errors import UsageError
from deploykit.images import Images, calibration_images, verification_images
from deploykit.recipe import Recipe
from deploykit.recovery import training_set
from deploykit.types import Backbone

__all__ = ["Inputs"]

_FIDELITY_IMAGES = 256  # maps hold thousands of values an image: their error settles early


class Inputs:
    """The images of a run, opened before anything is written, so bad data fails early."""

    def __init__(self, recipe: Recipe, backbone: Backbone) -> None:
        self.notes: list[str] = []
        if recipe.gates.max_drop is not None and not backbone.weights.trained:
            message = (
                "max-drop needs trained weights, but this run has none "
                f"({backbone.weights.source}); give --weights FILE or leave the limit out"
            )
            raise UsageError(message)
        section = recipe.calibration
        self.calibration: Images = calibration_images(
            section.data, backbone, section.images, recipe.seed, recipe.model.classes
        )
        if section.data is None:
            self.notes.append(
                "no calibration images given: using synthetic ones; give --calib DIR for real use"
            )
        self.evaluation: ImageSet | None = None
        self.fidelity: Images | None = None
        """What feature maps are compared on; None of a model that gives scores."""
        if backbone.levels:
            self.fidelity = self._unlabelled(recipe, backbone)
        elif recipe.evaluation.data is not None and backbone.weights.trained:
            self.evaluation = open_dataset(
                recipe.evaluation.data,
                backbone.preprocessing,
                labelled=True,
                num_classes=backbone.num_classes,
                limit=recipe.evaluation.images,
                seed=recipe.seed,
            )
            if recipe.model.classes is not None:
                self.evaluation = self._of_classes(self.evaluation, recipe.model.classes)
        elif recipe.evaluation.data is not None:
            self.notes.append("accuracy refused: the weights are untrained")
        if recipe.recover.active and recipe.model.classes is None:  # a part's classes come later
            training_set(recipe, backbone)
        self.verification: Images = verification_images(
            self.evaluation, self.fidelity or self.calibration, recipe.verify.images
        )

    def _unlabelled(self, recipe: Recipe, backbone: Backbone) -> Images:
        """The images given for evaluation, or else those of calibration."""
        self.notes.append(
            "accuracy withheld: the model gives feature maps and no classes; what is reported is "
            "how near each map is to the original's"
        )
        section = recipe.evaluation
        if section.data is None:
            return self.calibration
        count = section.images or _FIDELITY_IMAGES
        return calibration_images(section.data, backbone, count, recipe.seed)

    def _of_classes(self, images: ImageSet, classes: list[int]) -> ImageSet | None:
        try:
            return images.of_classes(classes)
        except UsageError as error:
            self.notes.append(f"accuracy not measured: {error}")
            return None
