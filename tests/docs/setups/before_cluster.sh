# Slurm's programs: tests/launch/test_cluster_page.py has those that start ranks, and here a script is parsed alone.
export SLURM_JOB_NODELIST=node1 SLURM_CPUS_PER_TASK=1
scontrol() { echo node1; }
srun() { bash -n -c "${@: -1}"; }
