"""Check the metrics of a finished run of recipes/mnist5k/demo.yaml. Exit status 1 if one is too low.

python bench/check_demo.py runs/demo
"""

import json
import sys
from pathlib import Path


def main():
    metrics = json.loads(Path(sys.argv[1], "metrics.json").read_text())
    lost = metrics["dense_accuracy"] - metrics["accuracy"]
    seconds = metrics["seconds"] + metrics["dense_seconds"]
    checks = {
        f"sparsity {metrics['sparsity']:.4f} ≥ 0.95": metrics["sparsity"] >= 0.95,
        f"accuracy {metrics['accuracy']:.4f} ≥ 0.965": metrics["accuracy"] >= 0.965,
        # Compared in whole examples: the test split has 1000.
        f"accuracy lost {lost:+.4f} ≤ 0.010": round(1000 * lost) <= 10,
    }
    for check, passed in checks.items():
        print("ok  " if passed else "FAIL", check)
    print(f"     training took {seconds:.0f} s; 60 to 300 s are usual")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
