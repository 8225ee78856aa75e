package kube

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// pki is a throw-away certificate authority together with everything that it signed. All paths are
// PEM files in one directory that disappears with the test.
type pki struct {
	dir    string
	caFile string
	caCert *x509.Certificate
	caKey  crypto.Signer

	storeServer    certPair
	storeClient    certPair
	apiserver      certPair
	serviceAccount string
}

type certPair struct{ certFile, keyFile string }

func newPKI(t *testing.T, dir string) *pki {
	t.Helper()
	p := &pki{dir: dir, caFile: filepath.Join(dir, "ca.crt")}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err, "make the CA key")
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "kelson-test-ca"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err, "sign the CA")
	p.caCert, err = x509.ParseCertificate(der)
	must(t, err, "parse the CA")
	p.caKey = key
	writePEM(t, p.caFile, "CERTIFICATE", der)

	p.storeServer = p.issue(t, 2, "store", x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)
	p.storeClient = p.issue(t, 3, "apiserver-etcd-client", x509.ExtKeyUsageClientAuth)
	p.apiserver = p.issue(t, 4, "kube-apiserver", x509.ExtKeyUsageServerAuth)
	p.serviceAccount = filepath.Join(dir, "sa.key")
	signer, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err, "make the service account key")
	writePEM(t, p.serviceAccount, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(signer))
	return p
}

func (p *pki) issue(t *testing.T, serial int64, name string, usage ...x509.ExtKeyUsage) certPair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err, "make a key")
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  usage,
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:     []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.caCert, key.Public(), p.caKey)
	must(t, err, "sign "+name)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(t, err, "encode the key of "+name)
	pair := certPair{filepath.Join(p.dir, name+".crt"), filepath.Join(p.dir, name+".key")}
	writePEM(t, pair.certFile, "CERTIFICATE", der)
	writePEM(t, pair.keyFile, "EC PRIVATE KEY", keyDER)
	return pair
}

// clientTLS is what a client of the store needs; without the pair it is a stranger to the store.
func (p *pki) clientTLS(t *testing.T, withCert bool) *tls.Config {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(p.caCert)
	config := &tls.Config{RootCAs: roots}
	if withCert {
		pair, err := tls.LoadX509KeyPair(p.storeClient.certFile, p.storeClient.keyFile)
		must(t, err, "load the client certificate")
		config.Certificates = []tls.Certificate{pair}
	}
	return config
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	must(t, os.WriteFile(path, text, 0o600), "write "+path)
}

func must(t *testing.T, err error, action string) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", action, err)
	}
}
