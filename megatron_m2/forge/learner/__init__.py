"""The train engine of RL: samples that share prefixes become token forests, and a step on those equals the step on the samples."""
