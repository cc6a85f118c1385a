"""Does a finished demo reach what is promised of it? Exit status 1 if not.

python bench/check_demo.py runs/demo
"""

import json
import sys
from pathlib import Path


def main():
    metrics = json.loads(Path(sys.argv[1], "metrics.json").read_text())
    lost = metrics["dense_accuracy"] - metrics["accuracy"]
    seconds = metrics["seconds"] + metrics["dense_seconds"]
    promises = {
        f"sparsity {metrics['sparsity']:.4f} ≥ 0.95": metrics["sparsity"] >= 0.95,
        f"accuracy {metrics['accuracy']:.4f} ≥ 0.965": metrics["accuracy"] >= 0.965,
        # In thousandths: the test part has 1000 digits.
        f"accuracy lost {lost:+.4f} ≤ 0.010": round(1000 * lost) <= 10,
    }
    for promise, kept in promises.items():
        print("ok  " if kept else "FAIL", promise)
    print(f"     training took {seconds:.0f} s; under 240 is meant, on two cores with nothing else to do")
    sys.exit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    main()
