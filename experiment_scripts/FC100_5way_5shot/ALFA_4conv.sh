#!/usr/bin/env bash
# ALFA, 4-CONV, FC100 5-way 5-shot: Baik et al., NeurIPS 2020, arXiv 2011.00209.
# Published accuracy: 53.01 ± 0.49 % (as reported by a leaderboard page).
# All but the method's own options are as in CxGrad's rows, which need not be the paper's recipe.
# Images stay at FC100's own 32×32.
# Time and memory: not measured on GPU.
#   bash experiment_scripts/FC100_5way_5shot/ALFA_4conv.sh 0
#   TEST=1 bash experiment_scripts/FC100_5way_5shot/ALFA_4conv.sh 0
#   TEST=1 TEST_DATASET=glyphs bash experiment_scripts/FC100_5way_5shot/ALFA_4conv.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"
row=(
  --dataset_name FC100 --image_height 32 --image_width 32 --image_channels 3 --normalization channel
  --num_classes_per_set 5 --num_samples_per_class 5 --num_target_samples 15 --batch_size 2
  --backbone 4-CONV --cnn_num_filters 48 --num_stages 4 --max_pooling true
  --batch_norm transductive --per_step_bn_statistics false --use_bias true
  --inner_loop_part all --number_of_training_steps_per_iter 5 --number_of_evaluation_steps_per_iter 5
  --init_inner_loop_learning_rate 0.01 --learnable_per_layer_per_step_inner_loop_learning_rate false
  --alfa true --init_inner_loop_weight_decay 0.0005
  --second_order true --first_order_to_second_order_epoch -1 --total_epochs 100 --total_iter_per_epoch 500
  --use_multi_step_loss_optimization false
  --meta_learning_rate 0.001 --min_learning_rate 0.001
  --num_evaluation_tasks 600 --top_n_models 5 --seed 104 --train_seed 0 --val_seed 0
)
run_row "$@"
