"""Plans of jobs: what a layout needs and costs, found out on a CPU before there are GPUs."""
