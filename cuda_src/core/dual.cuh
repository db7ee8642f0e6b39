// core: dual numbers, which carry a derivative along: what a function of floats gives for one, it gives with its slope
// for a dual number (Clifford, "Preliminary Sketch of Biquaternions", 1871).
#pragma once

struct Dual {
  float value, slope;

  Dual(float value, float slope = 0.0f) : value(value), slope(slope) {}

  // The value of a function here, of which that and the derivative are given.
  Dual through(float f, float derivative) const { return {f, derivative * slope}; }

  Dual& operator+=(Dual b) { return *this = {value + b.value, slope + b.slope}; }
  Dual& operator-=(Dual b) { return *this = {value - b.value, slope - b.slope}; }
  Dual& operator*=(Dual b) { return *this = {value * b.value, value * b.slope + slope * b.value}; }
  Dual& operator/=(Dual b) {
    const float quotient = value / b.value;
    return *this = {quotient, (slope - quotient * b.slope) / b.value};
  }
};

inline Dual operator+(Dual a, Dual b) { return a += b; }
inline Dual operator-(Dual a, Dual b) { return a -= b; }
inline Dual operator*(Dual a, Dual b) { return a *= b; }
inline Dual operator/(Dual a, Dual b) { return a /= b; }
inline Dual operator+(Dual a) { return a; }
inline Dual operator-(Dual a) { return {-a.value, -a.slope}; }

inline bool operator<(Dual a, Dual b) { return a.value < b.value; }
inline bool operator>(Dual a, Dual b) { return a.value > b.value; }
inline bool operator<=(Dual a, Dual b) { return a.value <= b.value; }
inline bool operator>=(Dual a, Dual b) { return a.value >= b.value; }
inline bool operator==(Dual a, Dual b) { return a.value == b.value; }
inline bool operator!=(Dual a, Dual b) { return a.value != b.value; }
