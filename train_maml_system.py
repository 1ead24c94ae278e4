"""Meta-train, validate and meta-test. The scripts in experiment_scripts/ call this; by hand, for example

python train_maml_system.py --dataset_name glyphs --image_height 32 --image_width 32 --contextual_grad true
python train_maml_system.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiment_builder import Experiment
from few_shot_learning_system import MAMLFewShotClassifier
from preprocess.preprocess import ensure_builtin
from utils import distributed
from utils.devices import choose_device
from utils.errors import UserError
from utils.options import parse_args


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    device = choose_device(options.gpu)
    with distributed.processes(device.type):
        test_dataset = options.test_dataset or options.dataset_name
        for name in {options.dataset_name, test_dataset} if distributed.is_main() else ():
            ensure_builtin(name, Path(options.dataset_dir))
        distributed.barrier()

        model = MAMLFewShotClassifier((options.batch_size, *options.image_shape), device, options)
        experiment = Experiment(options, model)
        if not options.evaluate_on_test_set_only:
            experiment.train()
        experiment.meta_test(test_dataset)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
