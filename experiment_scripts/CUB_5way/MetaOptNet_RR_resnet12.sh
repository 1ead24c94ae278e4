#!/usr/bin/env bash
# MetaOptNet-RR, ResNet-12, CUB 5-way: Lee et al., CVPR 2019, arXiv 1904.03758.
# Published accuracy: none known.
# No recipe is published; this is that of CIFAR-FS at the image size of this data set.
# One training serves 1-shot and 5-shot; batch norm is inductive, unlike the MAML family's.
# Time and memory: not measured on GPU.
#   bash experiment_scripts/CUB_5way/MetaOptNet_RR_resnet12.sh 0
#   TEST=1 bash experiment_scripts/CUB_5way/MetaOptNet_RR_resnet12.sh 0
#   TEST=1 TEST_DATASET=glyphs bash experiment_scripts/CUB_5way/MetaOptNet_RR_resnet12.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"
row=(
  --learner head --head Ridge
  --dataset_name CUB --image_height 84 --image_width 84 --image_channels 3 --normalization channel
  --augment true
  --num_classes_per_set 5 --num_samples_per_class 5 --num_target_samples 6 --batch_size 8
  --test_way 5 --val_shot 5 --val_query 15 --test_shots 1,5
  --backbone ResNet-12 --resnet_widths 64-160-320-640 --avg_pool false --dropblock_schedule official
  --batch_norm running --precision float32
  --total_epochs 60 --total_iter_per_epoch 1000
  --meta_learning_rate 0.1 --lr_schedule steps_official --outer_weight_decay 0.0005 --label_smoothing 0
  --num_evaluation_tasks 2000 --save_epoch 10 --top_n_models 5 --seed 104 --train_seed 0 --val_seed 0
)
run_row "$@"
