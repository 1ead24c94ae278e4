#!/usr/bin/env bash
# MetaOptNet-RR, conv64, FC100 5-way: Lee et al., CVPR 2019, arXiv 1904.03758.
# Published accuracy: none known.
# One training serves 1-shot and 5-shot; batch norm is inductive, unlike the MAML family's.
# Time and memory: not measured on GPU.
#   python preprocess/preprocess.py --datasets FC100
#   bash experiment_scripts/FC100_5way/MetaOptNet_RR_conv64.sh 0
#   TEST=1 bash experiment_scripts/FC100_5way/MetaOptNet_RR_conv64.sh 0
#   TEST=1 TEST_DATASET=glyphs bash experiment_scripts/FC100_5way/MetaOptNet_RR_conv64.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"
row=(
  --learner head --head Ridge
  --dataset_name FC100 --image_height 32 --image_width 32 --image_channels 3 --normalization published
  --augment true
  --num_classes_per_set 5 --num_samples_per_class 15 --num_target_samples 6 --batch_size 8
  --test_way 5 --val_shot 5 --val_query 15 --test_shots 1,5
  --backbone conv64
  --batch_norm running --precision float32
  --total_epochs 60 --total_iter_per_epoch 1000
  --meta_learning_rate 0.1 --lr_schedule steps_official --outer_weight_decay 0.0005 --label_smoothing 0
  --num_evaluation_tasks 2000 --save_epoch 10 --top_n_models 5 --seed 104 --train_seed 0 --val_seed 0
)
run_row "$@"
