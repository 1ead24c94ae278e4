#!/usr/bin/env bash
# MAML, 4-CONV, tieredImageNet 5-way 1-shot: Finn et al., ICML 2017, arXiv 1703.03400.
# Published accuracy: 51.67 ± 1.81 % (MetaOptNet paper, table 1, 32 filters); 50.98 ± 0.26 % (unverified: quoted from
#   memory).
# All but the method's own options are as in CxGrad's rows, which need not be the paper's recipe.
# Time and memory: not measured on GPU.
#   bash experiment_scripts/tiered_imagenet_5way_1shot/maml_4conv.sh 0
#   TEST=1 bash experiment_scripts/tiered_imagenet_5way_1shot/maml_4conv.sh 0
#   TEST=1 TEST_DATASET=CUB bash experiment_scripts/tiered_imagenet_5way_1shot/maml_4conv.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"
row=(
  --dataset_name tiered_imagenet --image_height 84 --image_width 84 --image_channels 3 --normalization unit
  --num_classes_per_set 5 --num_samples_per_class 1 --num_target_samples 15 --batch_size 4
  --backbone 4-CONV --cnn_num_filters 48 --num_stages 4 --max_pooling true
  --batch_norm transductive --per_step_bn_statistics false --use_bias false
  --inner_loop_part all --number_of_training_steps_per_iter 5 --number_of_evaluation_steps_per_iter 5
  --init_inner_loop_learning_rate 0.01 --learnable_per_layer_per_step_inner_loop_learning_rate false
  --contextual_grad false
  --second_order true --first_order_to_second_order_epoch -1 --total_epochs 100 --total_iter_per_epoch 500
  --use_multi_step_loss_optimization false
  --meta_learning_rate 0.001 --min_learning_rate 0.001
  --num_evaluation_tasks 600 --top_n_models 5 --seed 104 --train_seed 0 --val_seed 0
)
run_row "$@"
