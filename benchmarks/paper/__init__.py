"""The figures of the T1−T2 paper (Luketina et al. 2016)."""
