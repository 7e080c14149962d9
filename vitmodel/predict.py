"""Stage: model package + images -> a score per image and per breast. Knows no label and no network: the Predictor does the work."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))

import sys

from vitmodel.config import PredictConfig
from vitmodel.data.releases import read_release
from vitmodel.predictor import Predictor, write_scores
from vitmodel.utils import NOT_A_MEDICAL_DEVICE


def predict(config: PredictConfig) -> int:
    """Write scores.csv, breast_scores.csv and submission.csv; 1 where any image was refused, so that scripts notice."""
    release = read_release(config.source, config.dataset)
    predictor = Predictor(config)
    images = predictor.score_images(release)
    breasts = predictor.score_breasts(images)
    write_scores(images, breasts, config.out)
    refused = images[images["status"] == "refused"]
    for row in refused.head(20).itertuples():
        print(f"refused: image {row.image_id}: {row.reason}: {row.remark}", file=sys.stderr)
    if len(refused) > 20:
        print(f"refused: {len(refused) - 20} more images, see scores.csv", file=sys.stderr)
    print(f"{len(images)} images, {len(refused)} refused, {len(breasts)} breasts scored in {config.out / 'breast_scores.csv'}")
    print(NOT_A_MEDICAL_DEVICE)
    return 1 if len(refused) else 0
