"""Stage: model package + manifest -> metrics.json and report.html. Knows no network: the Predictor gives the scores."""

import sys

if not __package__:  # run as a file: put the checkout, not this folder, on the path
    sys.path[0] = __file__.rsplit("/", 2)[0]
