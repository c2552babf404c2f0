"""Scoring trained runs: what is scored on which cases, the cases, the scores, and the pictures and pages made of them."""
