"""The terms that are minimised: L_sup and L_semi (set), L_pxl (contrastive), and those of teachers."""
