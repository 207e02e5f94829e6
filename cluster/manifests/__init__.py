"""What a cluster is asked for, written from a recipe and a site: Kubernetes, VMs, Slurm.

words       [deploy] of the site file: what nodes have and where they stand
needs       groups of nodes and their GPUs, from the recipe's and the site's numbers
carried     recipe.json and site.toml as they travel: paths that nodes see, no secrets
tree        typed values -> YAML
kube        the words of Kubernetes and KubeRay that are used; kuberay says them
launcher    Ray's cluster launcher: AWS and machines that are there already
slurm       a batch script
write       the files of one target
"""
